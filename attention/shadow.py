"""One attention call computed by another kernel as well, timed, compared, and thrown away."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .clock import now, seconds_between
from .guard import NOT_FINITE, figures, sample_error
from .kernel import Kernel
from .link import HostLink, is_out_of_memory
from .timings import Measured

if TYPE_CHECKING:
    from .route import Route

_MARGIN = 2.0  # times the host's own error: an exact kernel may be off by that where the tensors are hard on both


def quick(seconds: Iterable[float]) -> float:
    """The lower quartile: other programs only make calls slower, on a busy machine a quarter of them."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 4]


class Shadow:
    """A call of `kernel` beside a call of `route`. `first`: warmed up, and compared with float32.

    `times`: it is timed in so many calls of a forward, this one and the next. Not in one call again and again: the
    second time the tensors lie in the caches, and the host's own attention never has them there.
    Nothing is read from the device before `result` and `cost`.
    """

    def __init__(self, kernel: Kernel, route: Route, times: int, first: bool) -> None:
        self.kernel = kernel
        self.times = times
        self.first = first
        self._route = route
        self._reason = ""
        self._marks: list[Any] = []
        self._calls: list[tuple[Any, Any]] = []
        self._warmed = False  # the first of them had its tensors in the caches
        self._lost = 0.0  # seconds that a failed attempt took
        self._sums: torch.Tensor | None = None
        self._host_sums: torch.Tensor | None = None
        self._compared: tuple[Any, Any] | None = None

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, link: HostLink) -> None:
        """Compute the call with tensors as the host gave them. Whatever goes wrong is kept as a reason."""
        began = time.perf_counter()
        try:
            beside = self._route.beside(self.kernel, q, k, v)
            begin = now(q.device)
            self._warmed = self.first and q.is_cuda  # a CPU has nothing to warm that this call does not warm as well
            if self._warmed:
                beside.attend(q, k, v, mask)
            out = self._timed(beside, q, k, v, mask)
            if self.first:
                self._sums = self._compare(beside, q, k, v, mask, out)
            self._marks = [begin, now(q.device)]
        except Exception as error:
            self._failed(error, began, link)

    def again(
        self,
        route: Route,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        link: HostLink,
    ) -> None:
        """The same beside a later call of the forward, for its time only."""
        began = time.perf_counter()
        try:
            if not self._reason:
                self._timed(route.beside(self.kernel, q, k, v), q, k, v, mask)
        except Exception as error:
            self._failed(error, began, link)

    def _timed(
        self, beside: Route, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        begin = now(q.device)
        out = beside.attend(q, k, v, mask)
        self._calls.append((begin, now(q.device)))
        return out

    def _failed(self, error: Exception, began: float, link: HostLink) -> None:
        if isinstance(error, link.interrupts):
            raise
        self._lost = time.perf_counter() - began
        if is_out_of_memory(error):
            link.free_memory()
        self._reason = f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def see(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """The same call's output as the host's own attention computed it: to know what error the tensors cause."""
        if self._sums is not None:
            begin = now(q.device)
            self._host_sums = self._compare(self._route, q, k, v, mask, out)
            self._compared = (begin, now(q.device))

    def _compare(
        self,
        route: Route,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """(Σ|d|, Σ|ref|, Σd², Σref²) of a sample, and the sum of the whole output."""
        generator = torch.Generator(q.device).manual_seed(0)  # the same rows for both
        sums = sample_error(*route.plainly(q, k, v, mask, out), route.scale, generator)
        return torch.cat((sums, out.sum(dtype=torch.float32).reshape(1)))

    @property
    def cost(self) -> float:
        """Seconds that it took in all."""
        compared = seconds_between(*self._compared) if self._compared else 0.0
        run = seconds_between(*self._marks) if self._marks else 0.0
        return compared + run + sum(seconds_between(*call) for call in self._calls[1:]) + self._lost

    def result(self, known: Measured | None, host_seconds: float | None) -> Measured | None:
        """What is known now of the kernel; None where this call could tell nothing.

        host_seconds: what the host's own attention took for the call.
        """
        if self._reason:
            return Measured(reason=self._reason)
        known = known or Measured()
        if self._sums is not None:
            l1_sum, all1, l2_sum, all2, total = self._sums.tolist()
            l1, l2 = figures((l1_sum, all1, l2_sum, all2))
            host_l2, host_total = 0.0, 0.0
            if self._host_sums is not None:
                *parts, host_total = self._host_sums.tolist()
                host_l2 = figures(parts)[1]
            if not math.isfinite(total) and math.isfinite(host_total):
                return Measured(reason=NOT_FINITE)
            if not math.isfinite(l2):  # the right answer is zero, or not finite either
                return None
            known = Measured((), l1, l2, self._wrong(l2, host_l2))
        if host_seconds is None or host_seconds <= 0:
            return known
        calls = self._calls[1:] if self._warmed and len(self._calls) > 1 else self._calls
        own = quick(seconds_between(begin, end) for begin, end in calls)
        return known.with_pair(own, host_seconds)

    def _wrong(self, l2: float, host_l2: float) -> str:
        """Why this error is more than an exact kernel may have. What a lossy one may have, the budget decides."""
        assert self._route.call is not None
        allowed = max(self.kernel.tolerance[self._route.call.dtype], _MARGIN * host_l2)
        if not self.kernel.exact or l2 <= allowed:
            return ""
        return f"was off by {l2:.2g} (relative L2 against float32), allowed: {allowed:.2g}"


class Timed:
    """A call that is being timed as it runs, with what ran before it on the same tensors."""

    def __init__(self, device: torch.device, shadow: Shadow | None = None) -> None:
        self._device = device
        self.shadow = shadow
        self._begin, self._end = now(device), None

    def end(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """The call has been handed to the device in full, and `out` is its result."""
        self._end = now(self._device)
        if self.shadow is not None:
            self.shadow.see(q, k, v, mask, out)

    @property
    def seconds(self) -> float | None:
        """What the call took; None where it did not end. Waits for the device."""
        return None if self._end is None else seconds_between(self._begin, self._end)
