"""Put rules on a ComfyUI model, and follow the runs of that model.

A node calls `attach`: the model is cloned, the clone gets a `Router` as its attention override and two wrappers, and
nothing else in the process changes. Facts about the host that this relies on were tried on versions 0.16 to 0.30.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from comfy.patcher_extension import WrappersMP

from ..attention.chained import ChainedRouter
from ..attention.compiled import host_functions
from ..attention.policy import Policy, Rule
from ..attention.router import Router
from . import trampoline
from .attachment import KEY, OVERRIDE, Advisor, Attachment
from .default import Default, summary, wanted_kernel
from .process import LINK, MEASURED, kernels, machine, verdicts

log = logging.getLogger("attune")
_said: set[str] = set()  # kinds of models that the log has spoken of


def switched_off() -> bool:
    """`ATTUNE=off` in the environment makes the whole pack inert."""
    return os.environ.get("ATTUNE", "").strip().lower() in ("off", "0", "false", "no")


def count_blocks(model: Any) -> tuple[int, int | None]:
    """(number of double blocks that come before single ones, number of blocks), None where nobody can tell."""
    net = getattr(getattr(model, "model", None), "diffusion_model", None)

    def length(name: str) -> int:
        blocks = getattr(net, name, None)
        return len(blocks) if isinstance(blocks, torch.nn.ModuleList) else 0

    doubles = length("double_blocks")
    if doubles or length("single_blocks"):
        return doubles, doubles + length("single_blocks")
    if length("input_blocks"):  # a UNet: its transformers, in the order in which they run
        count = sum(type(module).__name__ == "SpatialTransformer" for module in net.modules())
        return 0, count or None
    for name in ("blocks", "transformer_blocks", "layers", "joint_blocks", "visual_transformer_blocks"):
        if length(name):
            return 0, length(name)
    return 0, None


def attached(model: Any) -> Attachment | None:
    """What an earlier node of this pack left on the model."""
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    for wrapper in wrappers:
        attachment = getattr(wrapper, "__self__", None)
        if isinstance(attachment, Attachment):
            return attachment
    return None


def attach(model: Any, *rules: Rule, node_type: str = "", advisor: Advisor | None = None) -> Any:
    """A clone of `model` whose policy has `rules` added at its end; `model` itself stays as it is.

    A model of a kind that cannot be patched is given back unchanged, with one line in the log.
    """
    if switched_off() or not rules:
        return model
    if not (hasattr(model, "clone") and hasattr(model, "model_options") and hasattr(model, "add_wrapper_with_key")):
        kind = type(model).__name__
        if kind not in _said:
            _said.add(kind)
            log.warning(
                "Attention: a model of type %s cannot be patched (wanted a ComfyUI ModelPatcher); it runs unchanged.",
                kind,
            )
        return model
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    override = options.get(OVERRIDE)
    standing = attached(patched)
    before = override if isinstance(override, Router) else standing.router if standing else None
    policy = before.policy if before else Policy()
    earlier = getattr(override, "earlier", None) if isinstance(override, Router) else override
    doubles, blocks = count_blocks(patched)
    parts = (policy.adding(*rules), kernels(), machine(), LINK, doubles, blocks)
    router = Router(*parts) if earlier is None else ChainedRouter(earlier, *parts)
    source = rules[0].source
    node_types = {**(standing.node_types if standing else {}), source: node_type}
    advisors = {**(standing.advisors if standing else {}), **({source: advisor} if advisor else {})}
    verdicts().tell(router.idle_session)
    attachment = Attachment(router, node_types, advisors)
    options[OVERRIDE] = router
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, attachment.outer_sample),
        (WrappersMP.APPLY_MODEL, attachment.apply_model),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


host_functions.update(
    {name: trampoline.plain(cell.cell_contents) for name, cell in trampoline.wrapped_cells(host_attention).items()}
)


_defaults: list[Default] = []  # at most one: the environment's


def start() -> None:
    """What happens once when ComfyUI has loaded the pack: the start-up block, and the default of the environment."""
    if switched_off():
        log.info("ATTUNE=off: ComfyUI-Attune does nothing.")
        return
    name = wanted_kernel()
    log.info("\n".join(summary(machine(), name)))
    verdicts().start()
    if name is not None:
        import comfy.ldm.modules.diffusionmodules.model as vae_module

        MEASURED.recall()
        _defaults.append(Default(name, kernels(), machine(), LINK, host_attention, vae_module))
        _defaults[0].apply()
        verdicts().tell(_defaults[0].router.idle_session)


def default_account() -> dict[str, Any]:
    """What the environment's default did so far: {requested, observed, refused, notes}; all empty without one."""
    if not _defaults:
        return {"requested": "", "observed": {}, "refused": [], "notes": []}
    return _defaults[0].account()
