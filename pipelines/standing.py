"""What stands on one pipeline while it is patched: the hooks on its models, the rules, and the run it is in."""

from __future__ import annotations

import functools
import itertools
import logging
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

from ..attention.clock import Clock
from ..attention.healing import Snapshot, healed
from ..attention.policy import Policy
from ..attention.router import Router
from ..attention.session import CURRENT, Forward, Session
from . import heirs
from .calls import intercepted
from .hooks import Hooks
from .models import bare, models_of, wants_gradients
from .process import kernels, link, machine
from .runs import HOST, Run, close, prove, recalled
from .steps import Steps, timestep_of

log = logging.getLogger("attune")
NAME = "_attune"  # where a pipeline keeps its Standing
_OUTSIDE = "outside calls of the pipeline"
_numbers = itertools.count(1)


@dataclass
class _Call:
    """A call of a pipeline that this thread is in."""

    standing: Standing
    router: Router
    session: Session
    steps: Steps | None


_CALL: ContextVar[_Call | None] = ContextVar("attune_call", default=None)


class Standing:
    """One per patched pipeline, which it does not keep alive: with the pipeline gone, its models are as they were.

    `handles` are those whose rules count, in the order in which they came; the last one's `foreign` is in force.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe_class = type(pipe)
        self.handles: list[Any] = []
        self.notes: dict[str, None] = {}
        self.active = True
        self.hooks = Hooks(self._watched, self.say, True)
        self._own = ""
        self._text_encoders = False
        self._router = self._make_router()
        self.pipe = weakref.ref(pipe)
        self._end = weakref.finalize(pipe, self.fall, True)
        self._end.atexit = False
        heirs.watch(self)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Standing:
        return self

    def say(self, text: str) -> None:
        """Once: in the log, and in every report."""
        if text in self.notes:
            return
        self.notes[text] = None
        log.warning("Attune: %s.", text)
        if (call := self._call()) is not None:
            call.session.record.note(text)

    # The rules

    def _make_router(self) -> Router:
        rules = [rule for handle in self.handles for rule in handle.policy.rules]
        return Router(Policy(tuple(rules)), kernels(), machine(self._own), link(self._own))

    def add(self, handle: Any) -> None:
        """Follow this handle's rules as well, from the next run on."""
        self._end_outside()
        self.handles.append(handle)
        self._rules_changed()

    def remove(self, handle: Any) -> None:
        """Follow its rules no more; without any handle the pipeline's models are as they were."""
        self._end_outside()
        self.handles.remove(handle)
        if self.handles:
            self._rules_changed()
        else:
            self.fall()

    def _rules_changed(self) -> None:
        wrap, encoders = self.handles[-1].foreign == "wrap", any(handle.text_encoders for handle in self.handles)
        if wrap != self.hooks.wrap_foreign or encoders < self._text_encoders:
            self.hooks.fall()
            self.hooks = Hooks(self._watched, self.say, wrap)
        self._text_encoders = encoders
        self._router = self._make_router()
        if (pipe := self.pipe()) is not None:
            self._stand(pipe)

    def _stand(self, pipe: Any) -> None:
        """Hook what is in the pipeline now."""
        self.hooks.stand(models_of(pipe, self._text_encoders))
        self._look_at_own()

    def _look_at_own(self) -> None:
        """The user may have set another back end: `auto` compares with that, and what is lossy is watched."""
        if (own := self.hooks.own()) != self._own:
            self._end_outside()
            self._own = own
            self._router = self._make_router()

    def _end_outside(self) -> None:
        """What models did outside calls of the pipeline is a run that has ended."""
        if (outside := self.outside()) is not None:
            for handle in self.handles:
                handle.runs.append(outside)

    # Forwards

    def _call(self) -> _Call | None:
        """The call of this pipeline that this thread is in."""
        call = _CALL.get()
        return call if call is not None and call.standing is self else None

    def _elsewhere(self) -> bool:
        """Is this thread in a call of another pipeline that is patched?"""
        call = _CALL.get()
        return call is not None and call.standing is not self and call.standing.active

    def _watched(self, model: torch.nn.Module, theirs: Callable[..., Any], whole: bool) -> Callable[..., Any]:
        """A model's forward, watched and repeated where a kernel's output is no good.

        whole: its SDPA calls are caught wherever they are made, as there are no modules known to make them.
        """

        @functools.wraps(theirs, updated=())  # what torch.compile has left on it holds for that one
        def forward(*args: Any, **kwargs: Any) -> Any:
            # In a forward of ours (a model in a model), or of another pipeline that shares this model: that one counts.
            if is_compiling() or not self.active or CURRENT.get() is not None or self._elsewhere():
                return theirs(*args, **kwargs)
            if wants_gradients(model, (args, kwargs)):
                # As a whole: gradient checkpointing computes parts of it again, when nobody is there to route them.
                self.say("a forward that gradients may be asked of is left to the pipeline (no `torch.no_grad()`)")
                return theirs(*args, **kwargs)
            self.hooks.look(model)
            return self._forward(theirs, args, kwargs, whole)

        return forward

    def _forward(self, theirs: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool) -> Any:
        call = self._call()
        if call is None:
            self._look_at_own()
            call = _Call(self, self._router, self._router.idle_session, None)
        session = call.session
        sigma = None if whole else timestep_of(args, kwargs)  # an encoder's second argument is its mask
        if call.steps is not None and call.steps.first is None:
            call.steps.first = sigma

        def run() -> Any:
            with intercepted() if whole else nullcontext():
                return theirs(*args, **kwargs)

        active = self._in_force(call, sigma)
        if getattr(getattr(theirs, "__self__", None), "_parallel_config", None) is not None:
            session.record.note(
                "several processes share each forward: nothing is repeated where a kernel's output is bad"
            )
            with Forward(call.router, session, active, sigma=sigma):
                return run()
        return healed(call.router, session, active, True, run, Snapshot(args, kwargs), sigma)

    def _in_force(self, call: _Call, sigma: torch.Tensor | None) -> frozenset[int]:
        """The rules in force; reads one number from the device where some depend on the percent."""
        policy = call.router.policy
        if not policy.depends_on_percent or sigma is None or call.steps is None:
            return policy.without_percent
        try:
            return policy.at_sigma(float(sigma), call.steps.percent_to_level)
        except (TypeError, ValueError) as error:
            call.session.record.note(f"nobody can tell how far sampling is ({error}): rules by percent do nothing")
            return policy.without_percent

    # Runs

    def call(self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the pipeline: a run, with its record."""
        if not self.active or self._call() is not None:
            return call(pipe, *args, **kwargs)
        self._stand(pipe)
        handles = list(self.handles)  # whose rules these are; a callback may take them away
        router, steps = self._router, Steps(getattr(pipe, "scheduler", None))
        session = Session(router)
        session.record.clock = Clock() if router.policy.timed else None
        run = self._run(next(_numbers), router, session)
        for note in self.notes:
            session.record.note(note)
        prove(router, str(getattr(pipe, "_execution_device", machine().main_device.name)), session)
        model = recalled(router, session, self.pipe_class, self.hooks.models.values())
        token = _CALL.set(_Call(self, router, session, steps))
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
            _CALL.reset(token)
            close(run, router, session, steps, model)
            for handle in handles:
                handle.runs.append(run)

    def _run(self, number: int, router: Router, session: Session, **about: Any) -> Run:
        kinds = dict.fromkeys(type(bare(model)).__name__ for model in self.hooks.models.values())
        name, own = f"{self.pipe_class.__name__} ({', '.join(kinds)})", router.machine.host_attention
        return Run(number, None, None, None, None, name, session.record, {}, host=HOST, own=own, **about)

    def outside(self) -> Run | None:
        """What models did outside calls of the pipeline, as a run that has not ended; None where that is nothing."""
        session = self._router.idle_session
        if not session.record.calls():
            return None
        run = self._run(0, self._router, session, status=_OUTSIDE)
        run.seconds = time.time() - run.started
        return run

    def fall(self, dead: bool = False) -> None:
        """Take every hook away; the models are as they were. `dead`: as their pipeline is gone."""
        self._end.detach()
        heirs.unwatch(self)
        self.active = False
        self.hooks.fall(dead)
