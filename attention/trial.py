"""What one run measures of one workload, and what of it is done in one forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .plan import HOST
from .shadow import Shadow, Timed, quick
from .timings import Measured, Workload, to_measure

if TYPE_CHECKING:
    from .route import Route
    from .tuner import Tuner

_AROUND = 8  # calls before and after the one with a candidate that are timed as they run


class Trial:
    """One workload under one wish, in one run.

    names: kernels worth a measurement. order: all kernels of the wish, the one that computes it first. found: what is
    known of them.
    """

    def __init__(
        self, workload: Workload, names: Sequence[str], order: tuple[str, ...], found: dict[str, Measured]
    ) -> None:
        self.workload = workload
        self.names = names
        self.order = order
        self.found = found
        self.seconds: list[float] = []  # of calls as `chosen` computed them
        self.unread: list[Turn] = []  # forwards that timed such calls, of which nothing has been read yet
        self.calls = 0  # in a forward
        self.seen = 0  # the number of the last forward that made such calls
        self.expected = 0.0  # seconds of one call, as an earlier run found them
        self.no_room: dict[str, list[str]] = {}

    @property
    def chosen(self) -> str:
        return self.order[0]

    @property
    def waiting(self) -> list[str]:
        """What needs another timing; nothing where the choice was made before."""
        return to_measure(self.names, self.order, self.found) if self.chosen == HOST else []

    @property
    def weight(self) -> float:
        return self.workload.operations * self.calls


class Turn:
    """One forward's part: one call of a trial is computed by a candidate as well, and some around it are timed."""

    def __init__(self, tuner: Tuner, target: Trial | None, at: int) -> None:
        self._tuner = tuner
        self._target = target
        self._at = at  # which of the target's calls, counted from 0
        self.counts: Counter[Trial] = Counter()
        self.timed: list[Timed] = []
        self._behind_shadow: list[Timed] = []
        self.shadow: Shadow | None = None

    @property
    def target(self) -> Trial | None:
        return self._target

    @property
    def any(self) -> bool:
        """Was a call timed?"""
        return bool(self.timed or self._behind_shadow)

    def begin(
        self, route: Route, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> Timed | None:
        """A call of a route with a trial is about to run. What comes back is to be told of its end."""
        trial = route.trial
        assert trial is not None
        number = self.counts[trial]
        self.counts[trial] = number + 1
        if self._target is None and trial.waiting:  # a run's first forward, which may be its only one
            self._target, self._at = trial, number
        if trial is not self._target or not 0 <= number - self._at + _AROUND < 2 * _AROUND:
            return None
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        first = None
        if number == self._at:
            first = self.shadow = self._tuner.shadow(trial, route, q, k, v, mask)
        elif self.shadow is not None and 0 < number - self._at < self.shadow.times:
            self.shadow.again(route, q, k, v, mask, self._tuner.link)
        shadowed = self.shadow is not None and 0 <= number - self._at < self.shadow.times
        timed = Timed(q.device, first)
        (self._behind_shadow if shadowed else self.timed).append(timed)
        return timed

    def seconds(self) -> float | None:
        """What a call took as the run made it, of those that were timed. Waits for the device.

        Those right behind a candidate found their tensors in the caches: they count where there are no others.
        """
        taken = [seconds for one in self.timed or self._behind_shadow if (seconds := one.seconds) is not None]
        return quick(taken) if taken else None
