"""ComfyUI-Attune: attention that tunes itself.

ComfyUI loads this folder as a custom node pack; `pip install comfyui-attune` gives the same code as `comfyui_attune`.
Importing it imports no kernel package and starts no GPU.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the pack's nodes."""
    from .nodes import AttuneExtension

    return AttuneExtension()
