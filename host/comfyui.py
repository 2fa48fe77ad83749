"""Put rules on a ComfyUI model, and follow the runs of that model.

A node calls `attach`: the model is cloned, the clone gets a `Router` as its attention override and two wrappers, and
nothing else in the process changes. Facts about the host that this relies on were tried on versions 0.16 to 0.30.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import torch
from comfy.cli_args import args as launch
from comfy.patcher_extension import WrappersMP

from ..attention.chained import ChainedRouter
from ..attention.compiled import host_functions
from ..attention.kernel import Kernel
from ..attention.link import HostLink
from ..attention.machine import Machine, read_machine
from ..attention.policy import Policy, Rule
from ..attention.record import Record
from ..attention.router import Router
from ..attention.session import Forward, Session
from ..doctor.hub import announce
from ..doctor.store import home
from ..kernels import KERNELS
from . import trampoline
from .default import Default, summary, wanted_kernel
from .kernels import host_kernels
from .runs import RUNS, RunInfo
from .server import prompt_context, send_run

log = logging.getLogger("attune")
OVERRIDE = "optimized_attention_override"
_WRAPPER_KEY = "attune"
_SESSION = "attune_session"  # in the options of one run, which its threads share
_said: set[str] = set()  # kinds of models that the log has spoken of
Advisor = Callable[[Record, int], list[str]]

# Launch flags of the host that choose its attention function, as in comfy/cli_args.py (newer ones may be missing).
_FLAGS = (
    "use_split_cross_attention",
    "use_quad_cross_attention",
    "use_pytorch_cross_attention",
    "use_sage_attention",
    "use_flash_attention",
    "use_ck_attention",
)


def switched_off() -> bool:
    """`ATTUNE=off` in the environment makes the whole pack inert."""
    return os.environ.get("ATTUNE", "").strip().lower() in ("off", "0", "false", "no")


def host_flag() -> str:
    """The launch flag that chose the host's attention, as the user typed it, or ""."""
    return next(("--" + flag.replace("_", "-") for flag in _FLAGS if getattr(launch, flag, False)), "")


@functools.cache
def machine() -> Machine:
    announce(home())
    chosen = trampoline.plain(host_attention.optimized_attention)
    name = getattr(chosen, "__name__", "").removeprefix("attention_")
    # Started with --cpu, ComfyUI leaves the GPUs alone, and so does the pack.
    return read_machine(name, host_flag(), gpus=not getattr(launch, "cpu", False))


@functools.cache
def kernels() -> dict[str, Kernel]:
    """Every kernel that this process knows, by name: the pack's and the two of the host."""
    return {kernel.name: kernel for kernel in (*KERNELS, *host_kernels(host_attention))}


def _free_bytes(device: str) -> int | None:
    try:
        here = torch.device(device)
        free = int(comfy.model_management.get_free_memory(here))
        memory = sys.modules.get("comfy.memory_management")
        if getattr(memory, "aimdo_enabled", False) and here.type == "cuda":
            # Weights that the host would give up under pressure, counted as its own ModelPatcher counts them.
            free += int(sys.modules["comfy_aimdo.model_vbar"].vbars_analyze(here.index))
        return free
    except Exception:  # a device the host knows nothing of
        return None


LINK = HostLink(
    plain=trampoline.plain,
    interrupts=(comfy.model_management.InterruptProcessingException,),
    free_memory=lambda: comfy.model_management.soft_empty_cache(True),
    free_bytes=_free_bytes,
)


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


class Attachment:
    """A router on one model, and the run it is in: the two wrappers that the host calls."""

    def __init__(self, router: Router, node_types: dict[str, str], advisors: dict[str, Advisor]) -> None:
        self.router = router
        self.node_types = node_types
        self.advisors = advisors

    def __deepcopy__(self, _memo: dict[int, Any]) -> Attachment:
        return self

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole sampling run: opens and closes its record, also when it is interrupted."""
        session = Session(self.router)
        options = executor.class_obj.model_options.setdefault("transformer_options", {})  # made for this run
        run = RUNS.open(
            model=type(getattr(getattr(executor.class_obj, "model_patcher", None), "model", None)).__name__,
            record=session.record,
            node_types=self.node_types,
            **prompt_context(),
        )
        options[_SESSION] = session
        try:
            with trampoline.installed(host_attention):
                out = executor(*args, **kwargs)
            run.status = "finished"
            return out
        except comfy.model_management.InterruptProcessingException:
            run.status = "stopped"
            raise
        except BaseException:
            run.status = "failed"
            raise
        finally:
            options.pop(_SESSION, None)
            self._close(run)

    def _close(self, run: RunInfo) -> None:
        try:
            record = run.record
            if record.shadowed:
                record.note(f"another pack's attention override kept {record.shadowed} calls; rules do not reach them")
            elif not record.observed() and record.forwards:
                text = (
                    f"no attention call of this model ({run.model}) reached the pack: it computes attention in its own "
                    "way, or a later node replaced the override. It ran unchanged."
                )
                record.note(text)
                if run.model not in _said:
                    _said.add(run.model)
                    log.info("Attention: %s", text)
            nodes = record.nodes()
            for source, advisor in self.advisors.items():
                if nodes[source].calls:
                    run.advice[source] = advisor(record, run.steps)
            send_run(run)
        except Exception:  # the account of a run must never cost the run
            log.exception("The record of a sampling run could not be completed")

    def apply_model(self, executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around one forward pass: settles which rules are in force and makes the router the current one."""
        router = self.router
        given = kwargs.get("transformer_options", args[3] if len(args) > 3 else None) or {}
        options = dict(given)
        session = options.pop(_SESSION, None)  # the model and its compiler never see it
        if not isinstance(session, Session) or session.record.policy is not router.policy:
            session = router.idle_session
        if "transformer_options" in kwargs:
            kwargs["transformer_options"] = options
        elif len(args) > 3:
            args = (*args[:3], options, *args[4:])
        active = router.policy.without_percent
        if router.policy.depends_on_percent:
            active = self._in_force(executor.class_obj, t, session)
        with Forward(router, session, active, takes_bare_calls=options.get(OVERRIDE) is router):
            return executor(x, t, *args, **kwargs)

    def _in_force(self, model: Any, t: torch.Tensor, session: Session) -> frozenset[int]:
        """The rules in force at the noise level `t`. Reads one number from the device, once per forward."""
        policy = self.router.policy
        try:
            return policy.at_sigma(float(t.max()), model.model_sampling.percent_to_sigma)
        except (AttributeError, TypeError, ValueError) as error:
            session.record.note(f"this model does not tell how far sampling is ({error}): rules by percent do nothing")
            return policy.without_percent


def _standing(model: Any) -> Attachment | None:
    """What an earlier node of this pack left on the model."""
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, _WRAPPER_KEY)
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
    standing = _standing(patched)
    before = override if isinstance(override, Router) else standing.router if standing else None
    policy = before.policy if before else Policy()
    earlier = getattr(override, "earlier", None) if isinstance(override, Router) else override
    doubles, blocks = count_blocks(patched)
    parts = (policy.adding(*rules), kernels(), machine(), LINK, doubles, blocks)
    router = Router(*parts) if earlier is None else ChainedRouter(earlier, *parts)
    source = rules[0].source
    node_types = {**(standing.node_types if standing else {}), source: node_type}
    advisors = {**(standing.advisors if standing else {}), **({source: advisor} if advisor else {})}
    attachment = Attachment(router, node_types, advisors)
    options[OVERRIDE] = router
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, attachment.outer_sample),
        (WrappersMP.APPLY_MODEL, attachment.apply_model),
    ):
        patched.remove_wrappers_with_key(kind, _WRAPPER_KEY)
        patched.add_wrapper_with_key(kind, _WRAPPER_KEY, wrapper)
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
    if name is not None:
        import comfy.ldm.modules.diffusionmodules.model as vae_module

        _defaults.append(Default(name, kernels(), machine(), LINK, host_attention, vae_module))
        _defaults[0].apply()


def default_account() -> dict[str, Any]:
    """What the environment's default did so far: {requested, observed, refused, notes}; all empty without one."""
    if not _defaults:
        return {"requested": "", "observed": {}, "refused": [], "notes": []}
    return _defaults[0].account()
