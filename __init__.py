"""ComfyUI-Attune: attention that tunes itself.

ComfyUI loads this folder as a custom node pack; `pip install comfyui-attune` gives the same code as `comfyui_attune`,
with `apply` and `applied` for diffusers pipelines. Importing it imports no kernel package, and starts no GPU; it
puts the quarantine in force once diffusers is imported (doctor/before_import.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .doctor.before_import import watch

__version__ = "0.1.0"
WEB_DIRECTORY = "./web"

# A script that imports this first may import diffusers beside a package that would take it down.
watch(Path(__file__).absolute().parent)


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the pack's nodes."""
    from .nodes import AttuneExtension

    return AttuneExtension()


# What scripts with diffusers pipelines use, and where it is: looked up on first use, so that ComfyUI never loads it.
_FOR_SCRIPTS = {
    "apply": ".pipelines.handle",
    "applied": ".pipelines.handle",
    "Handle": ".pipelines.handle",
    "Policy": ".attention.policy",
    "Rule": ".attention.policy",
}


def __getattr__(name: str) -> Any:
    if name not in _FOR_SCRIPTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_FOR_SCRIPTS[name], __name__), name)
