"""Importable stand-ins for attention packages that this machine cannot run.

Each folder here is a "variant": put alone on `sys.path` it provides one package with the signatures, layouts,
constraints and quirks of the real one, on CPU tensors. `pretend.py` holds what they share, `signatures.json` where
each signature was read, `read_signatures.py` reads those of the package index again.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
VARIANTS = tuple(sorted(path.name for path in HERE.iterdir() if path.is_dir() and not path.name.startswith("_")))
_NAMES = ("comfy_kitchen", "flash_attn", "flash_attn_interface", "sageattention", "sageattn3", "xformers")


def _taken() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _NAMES}


@contextmanager
def installed(*variants: str) -> Iterator[None]:
    """Make the named variants importable, and what is really installed under their names not.

    Whatever was imported before is put back afterwards. Raises KeyError for an unknown variant.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise KeyError(f"no stand-in called {variant}; there are {', '.join(VARIANTS)}")
    before = _taken()
    for name in before:
        del sys.modules[name]
    folders = [str(HERE / variant) for variant in variants]
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(folder)
        for name in _taken():
            del sys.modules[name]
        sys.modules.update(before)
        importlib.invalidate_caches()
