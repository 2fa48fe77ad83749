"""Fetching a kernel from the Hugging Face Hub: the only place of the pack that uses the network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attention.hub_package import hub_package
from .hub import COMMIT, HubError, Offer, Record, folder, offer, records

_LEFT_OVER = 86_400  # seconds after which an unfinished download is nobody's


class Hub:
    """The Hub as fetching needs it. Raises what the packages raise, and HubError where they are not there."""

    def __init__(self) -> None:
        try:
            package = hub_package()
            from huggingface_hub import HfApi
        except ImportError as error:
            raise HubError(str(error)) from error
        self._kernels, self._api = package, HfApi()

    def revision(self, repo: str) -> tuple[str, str]:
        """The newest version of a repository ("v2"; "main" where it has none), and its commit."""
        branches = {b.name: b.target_commit for b in self._api.list_repo_refs(repo, repo_type="kernel").branches}
        versions = [name for name in branches if re.fullmatch(r"v\d+", name)]
        name = max(versions, key=lambda text: int(text[1:])) if versions else "main"
        if name not in branches:
            raise HubError(f"{repo} has no version and no branch main")
        return name, branches[name]

    def variants(self, repo: str, commit: str) -> list[tuple[str, str]]:
        """(build, why not) of every build, the best for this machine first; why not is "" where it matches."""
        decisions = self._kernels.get_kernel_variants(repo, revision=commit)
        return [(decision.variant.variant_str, getattr(decision, "reason", "")) for decision in decisions]

    def sizes(self, repo: str, commit: str, variant: str) -> dict[str, int]:
        """Path → size of every file of a build."""
        tree = self._api.list_repo_tree(repo, f"build/{variant}", recursive=True, revision=commit, repo_type="kernel")
        return {item.path: item.size for item in tree if hasattr(item, "size") and not _is_bytecode(item.path)}

    def download(self, repo: str, commit: str, pattern: str, target: Path) -> None:
        """Put the files that match `pattern` below `target`, at their paths in the repository."""
        self._api.snapshot_download(
            repo,
            repo_type="kernel",
            revision=commit,
            allow_patterns=[pattern],
            ignore_patterns=["*.pyc", "**/__pycache__/**"],
            local_dir=target,
        )


def _is_bytecode(path: str) -> bool:
    return path.endswith(".pyc") or "__pycache__" in path.split("/")


@dataclass(frozen=True)
class Found:
    """What would be fetched, as the user is asked."""

    record: Record
    version: str
    python_packages: tuple[str, ...]


def fetch(name: str, home: Path, hub: Hub, agreed: Callable[[Found], bool], revision: str = "") -> Record | None:
    """Fetch the kernel `name`; None where `agreed` says no. Raises HubError; then nothing was changed.

    Everything goes into a folder of its own, which gets its name when it is complete.
    """
    wanted = offer(name)
    if revision and not COMMIT.fullmatch(revision):
        raise HubError(f"{revision!r} is not a commit: wanted are 40 digits of 0-9 and a-f")
    version, commit = ("", revision) if revision else hub.revision(wanted.repo)
    if not COMMIT.fullmatch(commit):
        raise HubError(f"{wanted.repo} gave {commit!r} for a commit")
    variant = _choose(wanted.repo, commit, hub.variants(wanted.repo, commit))
    base = home / "hub"
    base.mkdir(parents=True, exist_ok=True)
    _tidy(base)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=base))
    try:
        hub.download(wanted.repo, commit, f"build/{variant}/metadata.json", part)
        metadata = _metadata(part / "build" / variant)
        sizes = hub.sizes(wanted.repo, commit, variant)
        licence = str(metadata.get("license") or "not stated")
        record = Record(wanted.repo, commit, variant, licence, sum(sizes.values()))
        packages = tuple(map(str, metadata.get("python-depends") or ()))
        if not agreed(Found(record, version, packages)):
            return None
        final = folder(home, record)
        if not final.is_dir():
            hub.download(wanted.repo, commit, f"build/{variant}/*", part)
            _check(part, sizes, _metadata(part / "build" / variant))
            _has_functions(part / "build" / variant, wanted)
            shutil.rmtree(part / ".cache", ignore_errors=True)  # the download's own notes
            final.parent.mkdir(exist_ok=True)
            os.replace(part, final)
        _has_functions(final / "build" / variant, wanted)
    finally:
        shutil.rmtree(part, ignore_errors=True)

    def remember(state: dict[str, Record]) -> None:
        state[name] = record

    if not records(home).update(remember):
        raise HubError(f"{records(home).path} cannot be written, so the kernel would not be found")
    return record


def _choose(repo: str, commit: str, variants: list[tuple[str, str]]) -> str:
    for variant, why_not in variants:
        if not why_not:
            return variant
    listed = "".join(f"\n  {variant}: {why_not}" for variant, why_not in variants) or " it has none"
    raise HubError(f"No build of {repo} at {commit[:12]} matches this machine:{listed}")


def _metadata(build: Path) -> dict[str, Any]:
    try:
        data = json.loads((build / "metadata.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise HubError(f"The build {build.name} has no metadata that can be read: {error}") from error
    if not isinstance(data, dict):
        raise HubError(f"The metadata of the build {build.name} are not an object")
    if data.get("kernel-depends"):  # they would be fetched when it is loaded, in the middle of a run
        raise HubError(f"The build {build.name} needs further kernels of the Hub, which this version cannot fetch")
    return data


def _check(root: Path, sizes: dict[str, int], metadata: dict[str, Any]) -> None:
    """Is every file there, of its size, and with the digest that the build's own metadata name?"""
    for path, size in sizes.items():
        file = root / path
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise HubError(f"{path} is not complete: {found} bytes of {size}")
    digest = metadata.get("digest") or {}
    algorithm = str(digest.get("algorithm", "")).lower()
    if algorithm not in ("sha256", "sha512") or not sizes:
        return
    build = root / "/".join(next(iter(sizes)).split("/")[:2])
    for path, wanted in digest.get("files", {}).items():
        file = build / path
        if not file.resolve().is_relative_to(build.resolve()) or not file.is_file():
            raise HubError(f"{path} is in the build's list of files and was not in the download")
        if base64.b64encode(hashlib.new(algorithm, file.read_bytes()).digest()).decode() != wanted:
            raise HubError(f"{path} is not what the build's list of files says")


def _has_functions(build: Path, wanted: Offer) -> None:
    """Does the source of a build define what the adapter calls? Nothing of it is run."""
    text = "\n".join(path.read_text("utf-8", "replace") for path in sorted(build.rglob("*.py")))
    for function in wanted.functions:
        if not re.search(rf"^[ \t]*(?:def {function}\b|{function}[ \t]*=)", text, re.MULTILINE):
            raise HubError(f"{wanted.repo}, build {build.name}, has no {function}")


def _tidy(base: Path) -> None:
    """Remove what downloads left that were killed."""
    for path in base.glob(".part-*"):
        try:
            if time.time() - path.stat().st_mtime > _LEFT_OVER:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
