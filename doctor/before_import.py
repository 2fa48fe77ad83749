"""In a program without ComfyUI: the quarantine is put in force when diffusers is imported, and not before.

ComfyUI has prestartup_script.py for that, `attune run` its own start. Standard library only, and next to no time:
importing the pack installs it.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

# What imports attention packages by itself, and goes down with them.
_NAMES = frozenset({"diffusers", "transformers"})
_PRESTARTUP = "attune_doctor"  # what prestartup_script.py loads this folder as


class _Before(MetaPathFinder):
    """Finds nothing; applies the quarantine when one of the names is looked for, once."""

    def __init__(self, pack: Path) -> None:
        self._pack = pack

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname not in _NAMES or self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        quarantine = importlib.import_module(".quarantine", __package__)
        if not quarantine.applied():
            quarantine.apply(self._pack)


def watch(pack: Path) -> None:
    """Apply the quarantine before diffusers or transformers is imported; nothing where ComfyUI or a script has it."""
    late = any(name in sys.modules for name in _NAMES)
    if not late and _PRESTARTUP not in sys.modules and not any(type(one) is _Before for one in sys.meta_path):
        sys.meta_path.insert(0, _Before(pack))
