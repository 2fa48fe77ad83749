"""A router on one model, and the runs of that model: the two wrappers that the host calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ..attention.check import Check
from ..attention.clock import Clock
from ..attention.healing import Snapshot, healed
from ..attention.plan import AUTO, expand
from ..attention.prepare import make_ready
from ..attention.record import Record
from ..attention.router import Router
from ..attention.session import CURRENT, Forward, Session
from ..doctor.store import home
from . import trampoline
from .live import LIVE
from .process import MEASURED, kernels, verdicts
from .remembered import fingerprint, recall, remember
from .runs import RUNS, RunInfo
from .server import prompt_context, say_on_node, send_run
from .verdicts import OPEN

log = logging.getLogger("attune")
OVERRIDE = "optimized_attention_override"
KEY = "attune"
_INSIDE = WrappersMP.DIFFUSION_MODEL
_COMPILED = "torch.compile"  # the key of the host's wrapper
_SESSION = "attune_session"  # in the options of one run, which its threads share
_said: set[str] = set()  # kinds of models that the log has spoken of
Advisor = Callable[[Record, int], list[str]]


def _counting(run: RunInfo, callback: Any) -> Any:
    """The sampler's `callback`, which then also tells the run after each step that it has ended."""
    if callback is None:
        return None
    ends: list[tuple[int, int]] = []
    run.step_ends = ends

    def counting(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], int):
            ends.append((run.record.forwards, args[0] + 1))
        return callback(*args, **kwargs)

    return counting


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
        self._prepare(session.record, kwargs["sigmas"] if "sigmas" in kwargs else args[3] if len(args) > 3 else ())
        options = executor.class_obj.model_options.setdefault("transformer_options", {})  # made for this run
        run = RUNS.open(
            model=type(getattr(getattr(executor.class_obj, "model_patcher", None), "model", None)).__name__,
            record=session.record,
            node_types=self.node_types,
            **prompt_context(),
        )
        if "callback" in kwargs:
            kwargs["callback"] = _counting(run, kwargs["callback"])
        elif len(args) > 5:
            args = (*args[:5], _counting(run, args[5]), *args[6:])
        options[_SESSION] = session
        self._stand_inside(options)
        model = self._recall(executor.class_obj, session)
        try:
            self._prove(executor.class_obj, session.record)
            self._make_ready(executor.class_obj, session.record)
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
            self._end_tuning(session)
            self._remember(model, session)  # before pages hear of the end: they ask for the doctor's remarks then
            self._close(run)

    def _prepare(self, record: Record, sigmas: Any) -> None:
        """Tell the record what is known before the run: its noise levels, the model's blocks, what is to be timed."""
        try:
            # They may be on the GPU: all at once, not one by one.
            record.sigmas = sigmas.tolist() if isinstance(sigmas, torch.Tensor) else [float(one) for one in sigmas]
        except (TypeError, ValueError):  # another pack's idea of sigmas
            record.sigmas = []
        record.blocks, record.doubles = self.router.blocks, self.router.doubles
        record.clock = Clock() if self.router.policy.timed else None

    def _prove(self, guider: Any, record: Record) -> None:
        """Wait for the verdicts on kernels that a rule names; `auto` does without those that are still to come."""
        machine, model = self.router.machine, getattr(guider, "model_patcher", None)
        device = str(getattr(model, "load_device", machine.main_device.name))

        def say(name: str) -> None:
            text = f"waiting for the verdict on {name}: it is tried in a child process, once in this environment"
            record.note(text)
            log.info("Attention: %s.", text)
            say_on_node(text)

        stop = comfy.model_management.throw_exception_if_processing_interrupted
        wishes = dict.fromkeys(wish for rule in self.router.policy.rules for wish in rule.kernels)
        for wish in wishes:
            names = expand(wish, machine, device)
            if not wish.startswith("auto"):
                verdicts().wait(names, device, say, stop)
            elif waiting := [name for name, why in verdicts().refused(device).items() if name in names and why == OPEN]:
                record.note(
                    f"not tried yet on this machine, so {wish} leaves them out of this run: {', '.join(waiting)}"
                )

    def _make_ready(self, guider: Any, record: Record) -> None:
        """Load, and where need be compile, what `auto` may measure in this run: that is no part of the sampling."""
        measured, machine = MEASURED.recall(), self.router.machine
        device = str(getattr(getattr(guider, "model_patcher", None), "load_device", machine.main_device.name))
        wishes = {wish for rule in self.router.policy.rules for wish in rule.kernels if wish in AUTO}
        names = dict.fromkeys(name for wish in sorted(wishes) for name in expand(wish, machine, device))
        if measured is None or not names:
            return

        def say(text: str) -> None:
            record.note(text)
            log.info("Attention: %s.", text)
            say_on_node(text)

        stop = comfy.model_management.throw_exception_if_processing_interrupted
        make_ready(measured, self.router.kernels, names, machine, device, verdicts().refused, say, stop)

    def _end_tuning(self, session: Session) -> None:
        try:
            session.tuner.close()
            MEASURED.keep()
        except Exception:  # what is measured must never cost a run
            log.exception("What was measured for auto could not be kept")

    def _close(self, run: RunInfo) -> None:
        try:
            record = run.record
            if record.shadowed:
                record.note(f"another pack's attention override kept {record.shadowed} calls; rules do not reach them")
            elif not record.observed() and record.forwards and run.status == "finished":
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
        finally:
            LIVE.ended(run)

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
        active, sigma = router.policy.without_percent, t.max()
        if router.policy.depends_on_percent:
            active = self._in_force(executor.class_obj, sigma, session)
        bare = options.get(OVERRIDE) is router
        if session is router.idle_session:  # outside any run nothing can be repeated: each call is judged at once
            outer = CURRENT.get()
            if outer is not None and outer.router is router:  # the host nested a run in a run: the outer one watches
                return executor(x, t, *args, **kwargs)
            with Forward(router, session, active, bare, guard=Check(session.sampler)):
                return executor(x, t, *args, **kwargs)

        def forward() -> Any:
            return executor(x, t, *args, **kwargs)

        # EasyCache's own state: under torch.compile it stands inside this wrapper.
        cache = getattr(options.get("easycache"), "__dict__", None)
        return healed(router, session, active, bare, forward, Snapshot(args, kwargs, cache), sigma)

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the network itself, where `_stand_inside` put it and the model runs it: what `apply_model` does else.

        The guard of `apply_model` then sees no calls of its own. Some models (SD3) run no such wrappers.
        """
        outer = CURRENT.get()
        if outer is None or outer.router is not self.router or outer.rules is not None:
            return executor(*args, **kwargs)
        outer.inside = True  # the forwards in here are what counts

        def forward() -> Any:
            return executor(*args, **kwargs)

        bare = outer.takes_bare_calls
        snapshot = Snapshot(args, kwargs)
        return healed(self.router, outer.session, outer.active, bare, forward, snapshot, outer.sigma)

    def _stand_inside(self, options: dict[str, Any]) -> None:
        """Packs that wrap the network (EasyCache) keep its results: they must never see one that is not healed.

        So where there are such wrappers ours goes inside them. Not under torch.compile, whose graph it would break.
        """
        wrappers = options.get("wrappers", {})
        others = wrappers.get(_INSIDE, {})
        if others and _COMPILED not in wrappers.get(WrappersMP.APPLY_MODEL, {}):
            inside = {**{key: value for key, value in others.items() if key != KEY}, KEY: [self.diffusion_model]}
            options["wrappers"] = {**wrappers, _INSIDE: inside}

    def _recall(self, guider: Any, session: Session) -> str:
        """Tell the session what failed in earlier runs of this model; returns the model's fingerprint."""
        try:
            model = fingerprint(getattr(getattr(guider, "model_patcher", None), "model", None))
            for finding in recall(home(), model, kernels(), self.router.machine):
                session.blame(finding, remembered=True)
            return model
        except Exception:  # what is remembered must never cost a run
            log.exception("What failed in earlier runs of this model could not be looked up")
            return ""

    def _remember(self, model: str, session: Session) -> None:
        """Keep what was found in this run for later ones. `model` "" means that nobody could tell it."""
        try:
            if model and session.findings:
                remember(home(), model, session.findings, kernels(), self.router.machine)
        except Exception:
            log.exception("What failed in this run could not be kept for later ones")

    def _in_force(self, model: Any, sigma: torch.Tensor, session: Session) -> frozenset[int]:
        """The rules in force at this noise level. Reads one number from the device, once per forward."""
        policy, levels = self.router.policy, session.levels

        def level(percent: float) -> float:
            if percent not in levels:
                levels[percent] = float(model.model_sampling.percent_to_sigma(percent))
            return levels[percent]

        try:
            return policy.at_sigma(float(sigma), level)
        except (AttributeError, TypeError, ValueError) as error:
            session.record.note(f"this model does not tell how far sampling is ({error}): rules by percent do nothing")
            return policy.without_percent
