"""The pack's nodes, and how ComfyUI gets them."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import ComfyExtension, io

from ..host.comfyui import start, switched_off
from ..host.routes import add_routes
from ..host.server import watch_prompts
from .aliases import DeleteModelPassthrough, PatchFlashAttentionKJ, PathchSageAttentionKJ, Sage3AttentionOnlySwitch
from .benchmark import AttentionBenchmark
from .capture import AttentionCapture
from .doctor import AttentionDoctor
from .release import ReleaseModel
from .report import AttentionReport
from .rule import AttentionRule
from .sage3 import Sage3Switch
from .schema import DISABLED
from .sdpa import SDPAForce
from .selector import AttentionSelector

log = logging.getLogger("attune")
OWN: list[type[io.ComfyNode]] = [
    AttentionSelector,
    SDPAForce,
    Sage3Switch,
    AttentionRule,
    AttentionDoctor,
    AttentionReport,
    AttentionBenchmark,
    AttentionCapture,
    ReleaseModel,
]
OTHERS: list[type[io.ComfyNode]] = [
    Sage3AttentionOnlySwitch,
    PathchSageAttentionKJ,
    PatchFlashAttentionKJ,
    DeleteModelPassthrough,
]


def _taken() -> set[str]:
    """Node ids that other packs have registered so far. A pack that comes later replaces ours by itself."""
    import nodes as host_nodes  # ComfyUI's module of that name

    return set(host_nodes.NODE_CLASS_MAPPINGS)


def replacements() -> list[dict[str, Any]]:
    """What the front end's "Swap Nodes" may make of other packs' nodes: arguments of `io.NodeReplace`.

    A replacement copies values and cannot translate them, and every input it maps must be there: so only required
    inputs are mapped, and our validation accepts the other packs' names for kernels.
    """
    model = {"new_id": "model", "old_id": "model"}
    output = [{"new_idx": 0, "old_idx": 0}]
    fixed = [
        {"new_id": "precision", "set_value": "exact"},
        {"new_id": "when_unavailable", "set_value": "fallback"},
        {"new_id": "cross_attention", "set_value": "same"},
        {"new_id": "min_tokens", "set_value": 0},
    ]
    return [
        {
            "new_node_id": "Sage3Switch",
            "old_node_id": "Sage3AttentionOnlySwitch",
            "old_widget_ids": ["enable", "print_backend"],
            "input_mapping": [
                model,
                {"new_id": "enable", "old_id": "enable"},
                {"new_id": "per_block_mean", "set_value": False},
                *(
                    {"new_id": f"dense_{end}_{what}", "set_value": 0}
                    for what in ("percent", "blocks")
                    for end in ("first", "last")
                ),
            ],
            "output_mapping": output,
        },
        {
            "new_node_id": "AttentionSelector",
            "old_node_id": "PathchSageAttentionKJ",
            "old_widget_ids": ["sage_attention", "allow_compile"],
            # Its "auto" means some SageAttention: ours with "fast" comes nearest.
            "input_mapping": [
                model,
                {"new_id": "kernel", "old_id": "sage_attention"},
                {"new_id": "precision", "set_value": "fast"},
                *fixed[1:],
            ],
            "output_mapping": output,
        },
        {
            "new_node_id": "AttentionSelector",
            "old_node_id": "PatchFlashAttentionKJ",
            "old_widget_ids": ["allow_compile"],
            "input_mapping": [model, {"new_id": "kernel", "set_value": "flash"}, *fixed],
            "output_mapping": output,
        },
        {
            "new_node_id": "ReleaseModel",
            "old_node_id": "DeleteModelPassthrough",
            "old_widget_ids": [],
            "input_mapping": [{"new_id": "value", "old_id": "data"}, model],
            "output_mapping": output,
        },
    ]


async def _register_replacements() -> None:
    if not hasattr(io, "NodeReplace"):
        return  # an older host: the deprecated classes do the same
    from comfy_api.latest import ComfyAPI

    register = getattr(getattr(ComfyAPI(), "node_replacement", None), "register", None)
    if register is None:
        return
    for replacement in replacements():
        await register(io.NodeReplace(**replacement))


class AttuneExtension(ComfyExtension):
    async def on_load(self) -> None:
        try:
            add_routes()
            if not switched_off():
                watch_prompts()
            await _register_replacements()
            start()
        except Exception:  # the nodes work without any of it
            log.exception("ComfyUI-Attune could not start in full: its nodes work, its routes or its default may not")

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        taken = _taken()
        return [*OWN, *(node for node in OTHERS if node.__name__ not in taken)]


__all__ = ["DISABLED", "OTHERS", "OWN", "AttuneExtension", "replacements"]
