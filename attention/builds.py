"""How an attention package was built and what lies in it, from its metadata and its files. Imports none of them."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Import name → distribution names that carry it.
PACKAGES: dict[str, tuple[str, ...]] = {
    "xformers": ("xformers",),
    "flash_attn": ("flash-attn", "flash_attn"),
    "flash_attn_interface": ("flash-attn-3", "flash_attn_3", "flashattn-hopper"),
    "flash_attn.cute": ("flash-attn-4", "flash_attn_4", "flash-attn-cute"),
    "sageattention": ("sageattention",),
    "sageattn3": ("sageattn3",),
    "comfy_kitchen": ("comfy-kitchen", "comfy_kitchen"),
    "triton": ("triton", "triton-windows"),
}
# Compiled modules and folders of a package that lie beside it, at the top level.
_BESIDE: dict[str, tuple[str, ...]] = {
    "flash_attn": ("flash_attn_2_cuda",),
    "flash_attn_interface": ("flash_attn_3", "flash_attn_3_cuda", "flash_attn_config"),
    "sageattn3": ("fp4attn_cuda", "fp4quant_cuda"),
}
_DEPTH = 3  # folders below the package's own in which compiled modules are looked for
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_UNSEARCHED = frozenset({"triton"})  # a compiler with thousands of files, none of them a kernel's


@dataclass(frozen=True, slots=True)
class Build:
    """What a package tells of itself.

    `built`: phrases such as "CUDA 12.8", "PyTorch 2.8.0", "C++11 ABI"; empty where it says nothing. `wheel`: the tag of
    its wheel (cp39-abi3-win_amd64). `modules`: its compiled modules, dotted below the package ("backends.cuda._C");
    empty for pure Python.
    `names`: what `from package import …` can give: public parts, and what its __init__ defines or takes from them.
    """

    built: tuple[str, ...] = ()
    wheel: str = ""
    modules: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def find_spec(name: str) -> ModuleSpec | None:
    """The import spec of `name`, found without running any of its code or its parents' code; None: not importable."""
    parts = name.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
        for depth in range(1, len(parts)):
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = PathFinder.find_spec(".".join(parts[: depth + 1]), list(spec.submodule_search_locations))
    except (ImportError, ValueError):  # ValueError: a module that was put into sys.modules without a spec
        return None
    return spec


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    for distribution in PACKAGES[name]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.distribution(distribution)
    return None


def installed_version(name: str) -> str:
    """The version of the package with the import name `name`; "" where it has no metadata."""
    distribution = _distribution(name)
    return distribution.version if distribution else ""


def _dotted(digits: str) -> str:
    """ "2.8.0" from "280" and "2.10.0" from "2100": the first and the last digit stand alone."""
    if "." in digits or len(digits) < 3:
        return digits
    return f"{digits[0]}.{digits[1:-1]}.{digits[-1]}"


def _from_version(text: str) -> list[str]:
    """What a local version (2.8.3+cu12torch2.8cxx11abiTRUE) or a wheel's file name with one says."""
    local = text.partition("+")[2].lower()
    said = []
    if found := re.match(r"cu(\d{2})(\d)?(?!\d)", local):
        said.append(f"CUDA {'.'.join(part for part in found.groups() if part)}")
    if found := re.search(r"rocm(\d+(?:\.\d+)*)", local):
        said.append(f"ROCm {found[1]}")
    if found := re.search(r"(?:torch|pt)(\d+(?:\.\d+)*)(andhigher)?", local):
        said.append(f"PyTorch {_dotted(found[1].rstrip('.'))}{' or newer' if found[2] else ''}")
    if found := re.search(r"cxx11abi(true|false|0|1)", local):
        said.append("C++11 ABI" if found[1] in ("true", "1") else "old C++ ABI")
    return said


def _from_origin(text: str) -> list[str]:
    """What direct_url.json (PEP 610) says; of a place on this disk only that it is one, which may name its user."""
    data = json.loads(text)
    url = urlsplit(data["url"])
    name = unquote(url.path).rpartition("/")[2]
    if "vcs_info" in data:
        place = f"{url.hostname}{url.path.removesuffix('.git')}"
        return [f"from {place} at {data['vcs_info'].get('commit_id', '')[:10]}".removesuffix(" at ")]
    if "dir_info" in data:
        return ["from a local folder" + (", editable" if data["dir_info"].get("editable") else "")]
    return _from_version(name)


def _from_xformers(folder: Path) -> list[str]:
    """xformers keeps what it was built with in cpp_lib.json: {"version": {"cuda": 1208, "torch": "2.8.0+cu128"}}."""
    version = json.loads((folder / "cpp_lib.json").read_text("utf-8"))["version"]
    cuda, hip, torch = (version.get(key) for key in ("cuda", "hip", "torch"))
    said = [f"CUDA {cuda // 100}.{cuda % 100}"] if isinstance(cuda, int) else []
    said += [f"ROCm {hip}"] if hip else []
    return said + ([f"PyTorch {torch}"] if torch else [])


def _module(file: str) -> str:
    """The module that a compiled file is, or ""."""
    if not file.endswith((".so", ".pyd")):
        return ""
    name, _, rest = file.partition(".")
    # One that is built for another Python cannot be imported here, which is worth seeing.
    return name if f".{rest}" in EXTENSION_SUFFIXES else f"{name} (of another Python)"


def _compiled(folder: str, before: str = "", depth: int = _DEPTH) -> Iterator[str]:
    """The compiled modules in `folder` and below it."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if depth and not entry.name.startswith(("__", ".")):
                    yield from _compiled(entry.path, f"{before}{entry.name}.", depth - 1)
            elif (module := _module(entry.name)) and not entry.name.startswith("lib"):
                yield before + module


def _public(file: Path) -> list[str]:
    """The public names that a module's file defines or imports from its own package, in order; read, not run."""
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    names: dict[str, None] = {}

    def visit(body: list[ast.stmt]) -> None:
        for item in body:
            if isinstance(item, (ast.FunctionDef, ast.ClassDef)):
                names[item.name] = None
            elif isinstance(item, ast.ImportFrom) and (
                item.level or (item.module or "").split(".")[0] in (file.parent.name, file.stem)
            ):
                names.update(dict.fromkeys(alias.asname or alias.name for alias in item.names))
            elif isinstance(item, (ast.Try, ast.If)):
                visit(item.body)

    visit(tree.body)
    return [name for name in names if not name.startswith("_") and name != "*"]


def _parts(folder: Path) -> Iterator[str]:
    """The public modules of a package."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if not entry.name.startswith("_") and (entry.suffix == ".py" or (entry / "__init__.py").is_file()):
                yield entry.stem


def read_build(name: str) -> Build:
    """How the installed package `name` was built, as far as it says so. What cannot be read is left out."""
    spec, distribution = find_spec(name), _distribution(name)
    if spec is None:
        return Build()
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    said: list[str] = []
    wheel = ""
    if distribution is not None:
        said += _from_version(distribution.version)
        with contextlib.suppress(*_UNREADABLE):
            said += _from_origin(distribution.read_text("direct_url.json") or "")
        with contextlib.suppress(*_UNREADABLE):  # The first tag will do: others differ in their platforms.
            found = re.search(r"^Tag: *(\S+)", distribution.read_text("WHEEL") or "", re.MULTILINE)
            wheel = found[1] if found else ""
    if name == "xformers" and folders:
        with contextlib.suppress(*_UNREADABLE):
            said += _from_xformers(folders[0])
    modules: list[str] = []
    beside = _BESIDE.get(name, ())
    if name not in _UNSEARCHED:
        for folder in folders:
            modules += _compiled(str(folder))
        top = folders[0].parent if folders else Path(spec.origin or ".").parent
        with contextlib.suppress(OSError):
            for entry in os.scandir(top) if beside else ():
                if entry.name in beside and entry.is_dir():
                    modules += _compiled(entry.path, f"{entry.name}.")
                elif entry.name.partition(".")[0] in beside and (module := _module(entry.name)):
                    modules.append(module)
    names = _public(Path(spec.origin)) if spec.origin and spec.origin.endswith(".py") else []
    names += sorted(part for folder in folders for part in _parts(folder))
    return Build(tuple(dict.fromkeys(said)), wheel, tuple(sorted(modules)), tuple(dict.fromkeys(names)))
