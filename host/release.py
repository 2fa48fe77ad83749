"""What the node ReleaseModel does: have the host unload one model, so that its own books and later use stay right."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management as management

log = logging.getLogger("attune")
_ALL = 1e30  # bytes: more than any device has, as the host itself writes "everything"


def release(model: Any) -> str:
    """Unload `model` and its clones from the device they compute on. Returns what was freed, in a sentence.

    Takes what a loader gives: MODEL, or CLIP, VAE and the like, which hold theirs as `patcher`. Whoever uses it
    afterwards has the host load it again. Raises TypeError for anything else.
    """
    patcher = getattr(model, "patcher", model)
    if not (hasattr(patcher, "is_clone") and hasattr(patcher, "load_device")):
        raise TypeError(
            f"model: wanted a model (MODEL, CLIP, VAE), found {type(model).__name__}. Connect the model that the "
            "sampler before this node used."
        )
    name = type(getattr(patcher, "model", patcher)).__name__
    loaded = list(management.current_loaded_models)
    mine = [one for one in loaded if one.model is not None and one.model.is_clone(patcher)]
    size = sum(one.model_loaded_memory() for one in mine)
    if not mine:
        return f"{name} was not loaded; nothing to free."
    said = []
    for device in dict.fromkeys(one.device for one in mine):
        before = management.get_free_memory(device)
        management.free_memory(_ALL, device, keep_loaded=[one for one in loaded if one not in mine])
        after = management.get_free_memory(device)
        if getattr(device, "type", "") == "cpu":
            said.append(f"{name} was unloaded; it computes on the CPU, where its {_mb(size)} stay in memory.")
        else:
            said.append(f"{name}: {_mb(size)} unloaded from {device}, {_mb(after - before)} more are free there now.")
    text = " ".join(said)
    log.info("Attune: %s", text)
    return text


def _mb(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GB" if abs(size) >= 2**30 else f"{size / 2**20:.1f} MB"
