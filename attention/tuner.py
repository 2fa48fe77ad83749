"""`auto`, measured: kernels are timed on the tensors of the run itself, beside the host's own attention.

Until the choice for a workload is made, the host's own attention computes it. In a forward, one candidate at most
computes one of its calls as well, or a few where they are short: timed, compared with float32, and thrown away. The
host's own are timed around it, so what else the machine does hits both. When all candidates are known the fastest takes
over, between two forwards. All of it takes at most one percent of the time that sampling has taken so far, earlier runs
included; what is not known then is measured in later runs.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from .call import AttentionCall
from .clock import TIMED_DEVICES
from .guard import sample_bytes
from .kernel import Kernel
from .link import HostLink
from .machine import Machine
from .plan import HOST, Decision
from .policy import Rule
from .prepare import signature
from .record import Record
from .shadow import Shadow
from .timings import Measured, Workload, contenders, ranked, to_measure
from .trial import Trial, Turn

if TYPE_CHECKING:
    from .route import Route

log = logging.getLogger("attune")
_SHARE = 0.01  # of the time that sampling has taken so far
# What the first timing of a kernel costs more, in calls of the host's attention: comparing, on a GPU also warming up.
_FIRST = {"cpu": 0.5, "cuda": 1.5}
_SHORT, _REPEATS = 0.005, 3  # calls below so many seconds are repeated: single ones tell little
_CARRIED = 10.0  # seconds of measuring that short runs may save up: one call of the longest sequences takes half of one
_PATIENCE = 3  # forwards in which a candidate found no memory, after which it is left out
_SLOWER = 1.25  # times what the host's own attention took: a chosen kernel has turned slow
_RECENT = 8  # forwards after which a workload is taken to be over: nothing is waited for in vain
_SURE = 3  # forwards in which it has to have been so


class Tuner:
    """The choices of one run for `auto`. `measures` False: only what is known already is used."""

    def __init__(
        self, kernels: Mapping[str, Kernel], machine: Machine, link: HostLink, record: Record, measures: bool
    ) -> None:
        self._kernels, self._machine, self.link, self._record = kernels, machine, link, record
        self._timings = link.timings
        self._measures = measures
        self._found: dict[Workload, dict[str, Measured]] = {}  # read once: a run keeps to what it began with
        self._trials: dict[tuple[Workload, str, str], Trial] = {}  # by wish and source: each rule has its own budget
        self._began: float | None = None
        self._saved = 0.0  # seconds of measuring that earlier runs have left
        self.spent = 0.0  # seconds
        self._turns = 0
        self._lock = threading.RLock()

    def prefer(
        self, call: AttentionCall, rule: Rule, wish: str, wished: tuple[str, ...], runnable: Sequence[str]
    ) -> tuple[str, ...]:
        """The kernels `wished`, in the order in which they are to be taken. `runnable`: those that can run the call."""
        workload = Workload.of(call)
        if self._timings is None or len(wished) < 2 or workload.device_type not in TIMED_DEVICES:
            return wished
        host_first = (HOST, *(name for name in wished if name != HOST)) if HOST in wished else wished
        if workload.tiny:
            return host_first if self._measures else wished
        with self._lock:
            key = (workload, wish, rule.source)
            if key in self._trials:  # a plan that is made again, because a kernel failed
                return self._trials[key].order
            if workload not in self._found:
                self._found[workload] = self._timings.of(workload)
            found = self._found[workload]
            names = contenders(runnable, self._machine, workload.device_type)
            names = [name for name in names if not (self._measures and self._must_compile(name, call))]
            open_ = bool(to_measure(names, wished, found))
            if not self._measures:
                return wished if open_ or not found else ranked(wished, found, rule.error_budget, self._kernels)
            order = host_first if open_ else ranked(wished, found, rule.error_budget, self._kernels)
            if HOST in wished:
                trial = self._trials[key] = Trial(workload, names, order, found)
                trial.expected = self._timings.host_seconds.get(workload.key, 0.0)
            return order

    def trial(self, call: AttentionCall, taken: Decision) -> Trial | None:
        """What is to be timed in calls like this one, for which `taken` was decided."""
        with self._lock:
            trial = self._trials.get((Workload.of(call), taken.requested, taken.source))
        return trial if trial is not None and trial.chosen == taken.kernel else None

    def failed(self, call: AttentionCall, kernel: str, reason: str) -> None:
        """A kernel failed in the middle of a run: `auto` does not take it for such calls any more."""
        workload = Workload.of(call)
        if self._timings is not None and kernel in self._timings.of(workload):
            self._timings.keep(workload, kernel, Measured(reason=reason))

    def _must_compile(self, name: str, call: AttentionCall) -> bool:
        kernel = self._kernels[name]
        if self._timings is None or not kernel.needs.triton:
            return False
        if not self._timings.must_compile(signature(kernel, call)):
            return False
        self._record.note(f"{name} has to be compiled before it can be measured: done before the next run")
        return True

    def turn(self) -> Turn | None:
        """A forward begins; None where there is nothing to time."""
        with self._lock:
            if self._timings is None or not self._measures:
                return None
            if self._began is None:
                self._began, self._saved = time.perf_counter(), self._timings.allowance
            # First what takes most of the time, then whether a chosen kernel still is as fast as it was.
            recent = [one for one in self._trials.values() if one.waiting and self._turns - one.seen < _RECENT]
            target = max(recent, key=_weight, default=None)
            if target is None:
                known = [one for one in self._trials.values() if one.chosen != HOST and one.calls]
                target = known[self._turns % len(known)] if known else None
            # Another call each time, so that no block speaks for all.
            calls = max(1, target.calls - _REPEATS + 1) if target is not None else 1
            return Turn(self, target, self._turns % calls)

    def shadow(
        self,
        trial: Trial,
        route: Route,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> Shadow | None:
        """Compute this call by a candidate as well, where time and memory allow."""
        allowed = self._allowed()
        host = statistics.median(trial.seconds) if trial.seconds else trial.expected
        for name in trial.waiting if host else ():
            known, kernel = trial.found.get(name), self._kernels[name]
            times = _REPEATS if host < _SHORT else 1
            cost = known.ratio * host * times if known and known.pairs else (_FIRST[q.device.type] + times) * host
            if cost > allowed:
                break
            if reason := self._no_room(kernel, route, q, known is None):
                trial.no_room.setdefault(name, []).append(reason)
                continue
            shadow = Shadow(kernel, route, times, first=known is None)
            shadow.run(q, k, v, mask, self.link)
            return shadow
        return None

    def _allowed(self) -> float:
        """Seconds that measuring may take now."""
        assert self._began is not None and self._timings is not None
        return self._saved + _SHARE * (time.perf_counter() - self._began) - self.spent

    def _no_room(self, kernel: Kernel, route: Route, q: torch.Tensor, first: bool) -> str:
        """Why a call of the kernel would raise the peak of the memory in use, or "": it runs before the real one."""
        call = route.call
        assert call is not None
        out = call.batch * call.heads * call.q_len * call.v_dim * q.element_size()
        need = out + max(kernel.workspace_bytes(call), sample_bytes(call) if first else 0)
        spare = self.link.spare_bytes(call.device)
        if spare is None or need <= spare:
            return ""
        return f"would raise the peak of memory: needs {need / 2**20:,.0f} MiB, {max(0, spare) / 2**20:,.0f} are unused"

    def end(self, turn: Turn, good: bool) -> bool:
        """A forward has ended, and waits for the device anyway. True: choices have changed, plans are to be made anew.

        good: its result counts.
        """
        with self._lock:
            self._turns += bool(turn.counts)  # a forward around another one has no calls of its own
            for trial, calls in turn.counts.items():
                trial.calls, trial.seen = calls, self._turns
            trial_ = turn.target
            if trial_ is None or not turn.any or not good:
                return False
            if trial_.chosen != HOST:
                trial_.unread.append(turn)  # read when the run is over: nothing waits for the device here
                return False
            try:
                seconds = turn.seconds()
                if seconds is not None:
                    trial_.seconds.append(seconds)
                    if self._timings is not None:
                        self._timings.host_seconds[trial_.workload.key] = statistics.median(trial_.seconds)
                if (shadow := turn.shadow) is not None:
                    self.spent += shadow.cost
                    self._record.measuring = self.spent
                    name = shadow.kernel.name
                    if (measured := shadow.result(trial_.found.get(name), seconds)) is not None:
                        self._learn(trial_, name, measured)
                for name, reasons in trial_.no_room.items():
                    if len(reasons) == _PATIENCE:
                        self._learn(trial_, name, Measured(reason=reasons[-1]))
                if trial_.chosen == HOST and not trial_.waiting:
                    return self._settle(trial_)
            except Exception as error:  # a device that is lost, a kernel that tells nonsense: never the run's concern
                log.debug("A kernel's time could not be read: %s", error)
            return False

    def _learn(self, trial: Trial, name: str, measured: Measured) -> None:
        assert self._timings is not None
        trial.found[name] = measured
        self._timings.keep(trial.workload, name, measured)

    def _settle(self, trial: Trial) -> bool:
        """All that is to be known is known: the next forward begins with the fastest."""
        for key, one in list(self._trials.items()):
            if one.workload == trial.workload and one.chosen == HOST and not one.waiting:
                del self._trials[key]
        told = ", ".join(_told(name, measured) for name, measured in trial.found.items() if name in trial.order)
        self._record.note(f"auto measured {trial.workload}, in shares of the time of the host's own attention: {told}")
        return True

    def close(self) -> None:
        """The run is over. A kernel that was slower than the host's own had been, twice, is measured anew next time."""
        with self._lock:
            if self._timings is not None and self._began is not None:
                waiting = any(trial.waiting for trial in self._trials.values())
                most = _CARRIED if waiting else max(0.0, self._saved)  # other shapes may still need what was saved
                self._timings.allowance = min(most, self._allowed())
                self._timings.changed = self._timings.changed or waiting
            for trial in self._trials.values():
                trial.seconds += [seconds for turn in trial.unread if (seconds := turn.seconds()) is not None]
                known = trial.found.get(trial.chosen)
                if self._timings is None or known is None or len(trial.seconds) < _SURE:
                    continue
                host, took = known.host_seconds, statistics.median(trial.seconds)
                if not took > _SLOWER * host > 0:
                    self._timings.slow.discard(trial.workload.key)
                elif trial.workload.key not in self._timings.slow:  # perhaps the machine as a whole was slower
                    self._timings.slow.add(trial.workload.key)
                else:
                    self._timings.forget(trial.workload)
                    self._record.note(
                        f"{trial.chosen} took {1000 * took:.3g} ms for {trial.workload}, and the host's own attention "
                        f"{1000 * host:.3g} ms when both were measured: the next run measures again"
                    )


def _weight(trial: Trial) -> float:
    return trial.weight


def _told(name: str, measured: Measured) -> str:
    return f"{name} {measured.reason}" if measured.reason else f"{name} {measured.ratio:.2f}"
