"""What stands on one pipeline while it is patched: the hooks on its models, the rules, and the run it is in."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch.compiler import is_compiling

from ..attention.clock import Clock
from ..attention.healing import Snapshot, healed
from ..attention.kernel import machine_reasons
from ..attention.plan import AUTO, expand
from ..attention.policy import Policy
from ..attention.prepare import prepare
from ..attention.record import Record
from ..attention.router import Router
from ..attention.session import CURRENT, Forward, Session
from ..attention.timings import Timings
from ..doctor.store import home
from ..host.remembered import recall, remember
from ..host.run_files import FOLDER, save
from ..host.runs import RunInfo
from .calls import intercepted
from .hooks import Hooks
from .models import bare, models_of
from .process import LINK, PACK, keep_timings, kernels, machine, recall_timings, refused, verdicts
from .steps import Steps, timestep_of

log = logging.getLogger("attune")
NAME = "_attune"  # where a pipeline keeps its Standing
HOST = "diffusers"  # what made a run, in its record
_OUTSIDE = "outside calls of the pipeline"
_numbers = itertools.count(1)
_CALLED: ContextVar[Any] = ContextVar("attune_called", default=None)  # the Standing of the pipeline that is called


def _fingerprint(kind: type, models: Iterable[torch.nn.Module]) -> str:
    """Tells pipelines apart by what they compute: classes, configurations and sizes, not the weights' values."""
    about = []
    for model in map(bare, models):
        config = getattr(model, "config", None) or {}
        config = config.to_dict() if hasattr(config, "to_dict") else config  # a model of transformers
        config = sorted((str(key), str(value)) for key, value in config.items())
        about.append((type(model).__name__, config, sum(weights.numel() for weights in model.parameters())))
    return hashlib.sha256(repr((kind.__name__, about)).encode()).hexdigest()[:24]


class Standing:
    """One per patched pipeline. `policies` are those of its handles, in the order in which they came."""

    def __init__(self, pipe: Any, text_encoders: bool, wrap_foreign: bool) -> None:
        self.pipe_class = type(pipe)
        self.text_encoders = text_encoders
        self.handles: list[Any] = []
        self.active = True
        self.hooks = Hooks(self._watched, self.say, wrap_foreign)
        self.notes: dict[str, None] = {}
        self._router = self._make_router()
        self._session: Session | None = None
        self._steps: Steps | None = None

    def say(self, text: str) -> None:
        """Once: in the log, and in every report."""
        if text not in self.notes:
            self.notes[text] = None
            log.warning("Attune: %s.", text)

    # The rules

    def _make_router(self) -> Router:
        rules = [rule for handle in self.handles for rule in handle.policy.rules]
        return Router(Policy(tuple(rules)), kernels(), machine(), LINK)

    def rules_changed(self) -> None:
        """A handle has come or gone: runs that begin now follow the new rules."""
        self._router = self._make_router()

    def _watched(self, original: Callable[..., Any], whole: bool) -> Callable[..., Any]:
        """A model's forward, watched and repeated where a kernel's output is no good.

        whole: its SDPA calls are caught wherever they are made, as there are no modules known to make them.
        """

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            # In a forward of ours (a model in a model), or of another pipeline that shares this model: that one counts.
            others = _CALLED.get() not in (None, self)
            if is_compiling() or not self.active or CURRENT.get() is not None or others:
                return original(*args, **kwargs)
            return self._forward(original, args, kwargs, whole)

        return forward

    # Runs

    def _forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool) -> Any:
        session = self._session or self._router.idle_session
        router = self._router if self._session is None else self._run_router
        sigma = None if whole else timestep_of(args, kwargs)  # an encoder's second argument is its mask
        if self._steps is not None and self._steps.first is None:
            self._steps.first = sigma

        def run() -> Any:
            with intercepted() if whole else nullcontext():
                return original(*args, **kwargs)

        active = self._in_force(router, session, sigma)
        if getattr(getattr(original, "__self__", None), "_parallel_config", None) is not None:
            session.record.note(
                "several processes share each forward: nothing is repeated where a kernel's output is bad"
            )
            with Forward(router, session, active, sigma=sigma):
                return run()
        return healed(router, session, active, True, run, Snapshot(args, kwargs), sigma)

    def _in_force(self, router: Router, session: Session, sigma: torch.Tensor | None) -> frozenset[int]:
        """The rules in force; reads one number from the device where some depend on the percent."""
        policy = router.policy
        if not policy.depends_on_percent or sigma is None or self._steps is None:
            return policy.without_percent
        try:
            return policy.at_sigma(float(sigma), self._steps.percent_to_level)
        except (TypeError, ValueError) as error:
            session.record.note(f"nobody can tell how far sampling is ({error}): rules by percent do nothing")
            return policy.without_percent

    def call(self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the pipeline: a run, with its record."""
        if not self.active or self._session is not None:
            return call(pipe, *args, **kwargs)
        self.hooks.stand(models_of(pipe, self.text_encoders))
        self._run_router, self._steps = self._router, Steps(getattr(pipe, "scheduler", None))
        session = Session(self._run_router)
        record = session.record
        record.clock = Clock() if self._run_router.policy.timed else None
        run = RunInfo(next(_numbers), None, None, None, None, self._model_names(), record, {}, host=HOST)
        for note in self.notes:
            record.note(note)
        self._prove(str(getattr(pipe, "_execution_device", machine().main_device.name)), record)
        model = self._recall(session)
        self._session, token = session, _CALLED.set(self)
        try:
            out = call(pipe, *args, **kwargs)
            run.status = "finished"
            return out
        except KeyboardInterrupt:
            run.status = "stopped"
            raise
        except BaseException:
            run.status = "failed"
            raise
        finally:
            _CALLED.reset(token)
            self._session = None
            self._close(run, session, model)

    def _model_names(self) -> str:
        kinds = dict.fromkeys(type(bare(model)).__name__ for model in self.hooks.models.values())
        return f"{self.pipe_class.__name__} ({', '.join(kinds)})"

    def _prove(self, device: str, record: Record) -> None:
        """Wait for the verdicts on kernels that a rule names; `auto` does without those that are still to come."""
        measured = recall_timings()

        def say(name: str) -> None:
            text = f"waiting for the verdict on {name}: it is tried in a child process, once in this environment"
            record.note(text)
            log.warning("Attune: %s.", text)

        automatic: dict[str, None] = {}
        for wish in dict.fromkeys(wish for rule in self._router.policy.rules for wish in rule.kernels):
            names = expand(wish, machine(), device)
            if wish not in AUTO:
                verdicts().wait(names, device, say)
            else:
                automatic |= dict.fromkeys(names)
        if measured is not None and automatic:
            self._make_ready(measured, automatic, record)

    def _make_ready(self, measured: Timings, names: Iterable[str], record: Record) -> None:
        """Compile, where need be, what `auto` may measure in this run: that is no part of the sampling."""

        def may_run(name: str, on: str) -> bool:
            return not machine_reasons(kernels()[name], machine(), machine().device(on)) and name not in refused(on)

        def say(text: str) -> None:
            record.note(text)
            log.info("Attune: %s.", text)

        chosen = {name: kernels()[name] for name in names if name in kernels()}
        prepare(measured, chosen, may_run, say, lambda: None)

    def _recall(self, session: Session) -> str:
        """Tell the session what failed in earlier runs of such a pipeline; returns the pipeline's fingerprint."""
        try:
            model = _fingerprint(self.pipe_class, self.hooks.models.values())
            for finding in recall(home(PACK), model, kernels(), machine()):
                session.blame(finding, remembered=True)
            return model
        except Exception:  # what is remembered must never cost a run
            log.exception("What failed in earlier runs of this pipeline could not be looked up")
            return ""

    def _close(self, run: RunInfo, session: Session, model: str) -> None:
        try:
            if model and session.findings:
                remember(home(PACK), model, session.findings, kernels(), machine())
            session.tuner.close()
            keep_timings()
            record = session.record
            record.sigmas = self._steps.levels() if self._steps else []
            run.steps = max(0, len(record.sigmas) - 1)
            if not record.observed() and record.forwards and run.status == "finished":
                record.note("no attention call of this pipeline reached the pack: it ran unchanged")
            run.close()
            save(run, machine(), home(PACK) / FOLDER)
            for handle in self.handles:
                handle.runs.append(run)
        except Exception:  # the account of a run must never cost the run
            log.exception("The record of a pipeline's run could not be completed")

    def outside(self) -> RunInfo | None:
        """What models did outside calls of the pipeline, as a run that has not ended; None where that is nothing."""
        record = self._router.idle_session.record
        if not record.calls():
            return None
        run = RunInfo(0, None, None, None, None, self._model_names(), record, {}, status=_OUTSIDE)
        run.seconds = time.time() - run.started
        return run

    def fall(self) -> None:
        """Take every hook away; the pipeline is as it was."""
        self.active = False
        self.hooks.fall()
