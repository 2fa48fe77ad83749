"""The attention packages that ComfyUI imports when it starts: where they are, and a fingerprint. Imports none of them.

Standard library only, and a few milliseconds: this runs at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


@dataclass(frozen=True)
class Watched:
    """An import name: the distributions that carry it, compiled modules that lie beside it, the host's launch flag.

    `flag` is the name in comfy.cli_args.args; with it the host exits when the package cannot be imported.
    """

    distributions: tuple[str, ...]
    beside: tuple[str, ...] = ()
    flag: str = ""


# Source: the imports at the top of ComfyUI's comfy/ldm/modules/attention.py and comfy/model_management.py (0.30).
WATCHED: dict[str, Watched] = {
    "sageattention": Watched(("sageattention",), flag="use_sage_attention"),
    "sageattn3": Watched(("sageattn3",), ("fp4attn_cuda", "fp4quant_cuda")),
    "flash_attn": Watched(
        ("flash-attn", "flash-attn-4", "flash-attn-cute"), ("flash_attn_2_cuda",), flag="use_flash_attention"
    ),
    "xformers": Watched(("xformers",)),
}
# Packages of kernels that the host does not import, where more than the import name's own file belongs to them.
_OTHERS = {
    "flash_attn_interface": Watched(
        ("flash-attn-3", "flashattn-hopper"), ("flash_attn_3", "flash_attn_3_cuda", "flash_attn_config")
    )
}


@dataclass(frozen=True)
class Installed:
    """A package that is installed: its version ("" where nothing says it), and a digest of its files."""

    name: str
    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


def normal(distribution: str) -> str:
    """A distribution's name as the index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _spec(name: str) -> ModuleSpec | None:
    """The import spec of a top-level name, past sys.modules, where a quarantined name says None."""
    for finder in (PathFinder, *sys.meta_path):  # The others know packages that are installed as editable.
        try:
            spec = finder.find_spec(name, None)
        except Exception:  # Somebody else's finder.
            continue
        if spec is not None:
            return spec
    return None


def _files(folder: str, depth: str = "") -> Iterator[tuple[str, int, int]]:
    """(path, size, time of change in ns) of every file below `folder`, without what importing leaves there."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name != "__pycache__":
                    yield from _files(entry.path, f"{depth}{entry.name}/")
            elif not entry.name.endswith((".pyc", ".pyo")):
                stat = entry.stat()
                yield f"{depth}{entry.name}", stat.st_size, stat.st_mtime_ns


def _beside(folder: str, names: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in names and entry.is_dir():
                yield from _files(entry.path, f"{entry.name}/")
            elif entry.name.partition(".")[0] in names and entry.is_file():
                stat = entry.stat()
                yield entry.name, stat.st_size, stat.st_mtime_ns


def find(name: str, metadata: list[str]) -> Installed | None:
    """The package `name`, a top-level name, as it is installed, or None. `metadata` is what metadata_names() gave.

    Of a package that nobody has described here the version is "".
    """
    spec, watched = _spec(name), WATCHED.get(name) or _OTHERS.get(name) or Watched(())
    if spec is None:
        return None
    locations = [str(place) for place in spec.submodule_search_locations or ()]
    files: list[tuple[str, int, int]] = []
    try:
        for place in locations:
            files += sorted(_files(place))
            if watched.beside:
                files += sorted(_beside(str(Path(place).parent), watched.beside))
        if not locations and spec.origin:
            stat = os.stat(spec.origin)
            files.append((spec.origin, stat.st_size, stat.st_mtime_ns))
            if watched.beside:
                files += sorted(_beside(str(Path(spec.origin).parent), watched.beside))
    except OSError as error:
        files.append((str(error), 0, 0))
    return Installed(name, _version(watched, metadata), digest([locations, files]))


def _version(watched: Watched, metadata: list[str]) -> str:
    for wanted in watched.distributions:
        for entry in metadata:
            name, _, version = entry.rpartition(".")[0].partition("-")
            if normal(name) == wanted:
                return version.partition("-py")[0]  # An egg's folder names the Python as well.
    return ""


def search_path() -> list[str]:
    """The search path of this process as `import` sees it: packs also append Paths there, which Python passes over."""
    from sys import path

    return [entry for entry in path if isinstance(entry, str)]


def metadata_names() -> list[str]:
    """The names of all metadata folders (numpy-2.3.1.dist-info): what is installed, and in which version."""
    found = set()
    for folder in dict.fromkeys(search_path()):
        try:
            with os.scandir(folder or ".") as entries:
                found.update(entry.name for entry in entries if entry.name.endswith((".dist-info", ".egg-info")))
        except OSError:
            continue
    return sorted(found)


def environment(metadata: list[str]) -> str:
    """A digest of what an import may depend on besides the package: Python, everything installed, GPUs and driver.

    A compiled package depends on torch, CUDA, Triton and numpy, so a changed version of anything counts.
    """
    return digest([sys.version, platform.machine(), sys.platform, metadata, _driver()])


def _driver() -> list[str]:
    """What tells that the NVIDIA driver or the GPUs have changed, without asking the driver."""
    if os.name == "nt":
        library = Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll"
    else:
        library = Path("/usr/lib/wsl/lib/libcuda.so.1")  # Linux under Windows has no NVIDIA folder in /proc.
    said = []
    with contextlib.suppress(OSError):
        stat = library.stat()
        said.append(f"{stat.st_size} {stat.st_mtime_ns}")
    proc = Path("/proc/driver/nvidia")
    for file, wanted in (
        (proc / "version", ""),
        *((file, "Model:") for file in sorted(proc.glob("gpus/*/information"))),
    ):
        with contextlib.suppress(OSError):  # The other lines of these files may change from boot to boot.
            said += [line for line in file.read_text("utf-8", "replace").splitlines() if line.startswith(wanted)]
    return said


def fingerprint(installed: Installed, environment: str) -> str:
    """The key under which a verdict about this package in this environment is kept."""
    return digest([installed.name, installed.version, installed.digest, environment])


def digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:32]
