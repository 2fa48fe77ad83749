"""Judge attention calls on the spot: to find a culprit, and for calls outside any forward that could be repeated."""

from __future__ import annotations

import math

import torch

from .guard import NOT_FINITE, Finding, Place, Sample, Sampler, figures
from .route import Route

_AT_ONCE = 2  # calls of a route that are judged at once where the later ones are judged in bulk


class Check:
    """Judges every call at once, with a synchronisation each: to find a culprit, and for calls outside any forward.

    `bulk`: after the first calls of each route, outputs are judged that many together, with one synchronisation. What
    is found then is too late for those calls, and in time for the next.
    """

    def __init__(self, sampler: Sampler, bulk: int = 0) -> None:
        self._sampler = sampler
        self._bulk = bulk
        self._waiting: list[tuple[Route, torch.Tensor]] = []
        self.findings: list[Finding] = []

    def see(
        self,
        route: Route,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        out: torch.Tensor,
    ) -> Finding | None:
        """What is wrong with this call's output, or one before it, or None. The error is measured once per route."""
        route.judged += 1
        if self._bulk and route.judged > _AT_ONCE and route.compared:
            self._waiting.append((route, out.sum(dtype=torch.float32)))
            return self._read() if len(self._waiting) >= self._bulk else None
        reason = ""
        if not math.isfinite(float(out.sum(dtype=torch.float32))):
            # With NaN in its inputs no kernel could do better.
            inputs = sum(float(t.sum(dtype=torch.float32)) for t in (q, k, v))
            reason = NOT_FINITE if math.isfinite(inputs) else ""
        elif not route.compared and (sums := self._sampler.measure(route, q, k, v, mask, out)) is not None:
            reason = Sample(route, *figures(sums.tolist())).beyond
        if not reason or route.call is None:
            return None
        finding = Finding(route.name, Place.of(route.call), reason)
        if not self._bulk:
            self.findings.append(finding)
        return finding

    def _read(self) -> Finding | None:
        """Judge what waits; the first that is no good, if any."""
        waiting, self._waiting = self._waiting, []
        found = None
        for device in {sum_.device for _, sum_ in waiting}:
            here = [(route, sum_) for route, sum_ in waiting if sum_.device == device]
            for (route, _), value in zip(here, torch.stack([sum_ for _, sum_ in here]).tolist(), strict=True):
                if not math.isfinite(value) and route.call is not None:
                    found = found or Finding(route.name, Place.of(route.call), NOT_FINITE)
        return found
