"""One run as it is told to who watches while it goes on: what is in its record, as small rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from ..attention.entries import Happening, Seen
from .runs import RunInfo

_MOST_CELLS = 10_000  # in one event
_MOST_EVENTS = 100  # things that did not go as planned, and notes, in one event
_MOST_LETTERS = 1000  # of a text: an exception's own words may be long

Cells = list[list[Any]]


def _happening(number: int, what: Happening, seen: Seen, step: int | None) -> dict[str, Any]:
    return {
        "id": number,
        "kind": what.kind,
        "text": what.text[:_MOST_LETTERS],
        "kernel": what.kernel,
        "reason": what.reason[:_MOST_LETTERS],
        "block": what.block,
        "call_kind": what.call_kind,
        "step": step,
        "count": seen.count,
    }


class Following:
    """One run, as it is told while it goes on. Reads its record from another thread than the one that fills it.

    `changed`: the steps in which something is new since it was told last.
    """

    def __init__(self, run: RunInfo) -> None:
        self.run = run
        self.changed: set[int] = set()
        self._kernels: dict[str, int] = {}  # each with its number
        self._kinds: dict[str, None] = {}
        self._steps: defaultdict[int, Counter[int]] = defaultdict(Counter)  # step → how often which pattern
        self._calls: Counter[str] = Counter()
        self._of_pattern: dict[int, Counter[str]] = {}  # calls per kernel
        self._seconds: Counter[str] = Counter()
        self._passes = self._timed = 0  # so many have been looked at
        self._step: int | None = None
        self._happened: list[tuple[Happening, Seen]] = []
        self._told: dict[int, int] = {}  # number of a happening → the count that was told
        self._notes: list[str] = []

    def look(self) -> bool:
        """Take in what the record has by now; is there anything new to tell?"""
        record = self.run.record
        passes = record.history.passes(self._passes)
        self._passes += len(passes)
        for forward, pattern, discarded in passes:
            self._step = self.run.step_of(forward)
            if not discarded:
                self._steps[self._step][pattern] += 1
                self._calls.update(self._count(pattern))
                self.changed.add(self._step)
        if record.clock is not None:
            self._timed, seconds = record.clock.known(self._timed)
            self._seconds.update(seconds)
        notes, self._notes = self._notes, record.notes
        self._happened = list(record.happened().items())
        return bool(passes or self.changed or self._notes != notes or self._untold())

    def _untold(self) -> list[int]:
        """Numbers of the happenings that were not told as often as they were met."""
        return [number for number, (_, seen) in enumerate(self._happened) if self._told.get(number) != seen.count]

    def _count(self, pattern: int) -> Counter[str]:
        """Calls per kernel of a pattern; what has not been met before gets its number."""
        found = self._of_pattern.get(pattern)
        if found is None:
            found = self._of_pattern[pattern] = Counter()
            for cell, count in self.run.record.history.patterns[pattern]:
                self._kernels.setdefault(cell.kernel, len(self._kernels))
                self._kinds.setdefault(cell.kind)
                found[cell.kernel] += count
        return found

    @property
    def kernels(self) -> list[str]:
        """Their names, in the order of their numbers."""
        return list(self._kernels)

    def end(self) -> None:
        """The run is over: what its record says now takes the place of all that was told."""
        record = self.run.record
        self._kernels, self._kinds, self._of_pattern = {}, {}, {}
        self._steps.clear()
        for step in record.history.steps:
            self._steps[step.number] = step.kept
            for pattern in step.kept:
                self._count(pattern)
            self._step = step.number
        self._calls = record.observed()
        for name in self._calls:  # where a record had no room for the forwards
            self._kernels.setdefault(name, len(self._kernels))
        self._seconds = Counter({name: timing.seconds for name, timing in record.times.items()})
        self._happened, self._notes = list(record.happened().items()), record.notes

    def cells(self, steps: set[int] | None = None, most: int = _MOST_CELLS) -> tuple[Cells, set[int], int]:
        """(rows [step, block, kind, index of the kernel, calls], the steps they are of, how many steps are left out).

        steps: those wanted, None for all. Whole steps, the newest where not all have room.
        """
        patterns = self.run.record.history.patterns
        wanted = sorted(self._steps if steps is None else steps, reverse=True)
        parts: list[Cells] = []
        room = most
        for step in wanted:
            counts: Counter[tuple[int | None, str, int]] = Counter()
            for pattern, times in self._steps[step].items():
                for (block, kind, kernel), calls in patterns[pattern]:
                    counts[block, kind, self._kernels[kernel]] += calls * times
            room -= len(counts)
            if parts and room < 0:
                break
            parts.append([[step, *place, calls] for place, calls in counts.items()])
        told = wanted[: len(parts)]
        return [cell for part in reversed(parts) for cell in part], set(told), len(wanted) - len(told)

    def _happenings(self, full: bool) -> list[dict[str, Any]]:
        history, closed = self.run.record.history, self.run.record.closed
        found = []
        for number in (range(len(self._happened)) if full else self._untold())[-_MOST_EVENTS:]:
            what, seen = self._happened[number]
            step = history.step_of_forward(seen.forward) if closed else self.run.step_of(seen.forward)
            found.append(_happening(number, what, seen, step))
        return found

    def event(self, full: bool) -> dict[str, Any]:
        """What is told now: everything, or what has changed."""
        run, record = self.run, self.run.record
        cells, told, left = self.cells(None if full else self.changed)
        in_all = sum(self._seconds.values())
        errors = dict(record.errors)
        times = {}
        for name in self._kernels:
            seconds = self._seconds.get(name)
            error = errors.get(name)
            times[name] = {
                "calls": self._calls[name],
                "seconds": seconds,
                "share": seconds / in_all if seconds is not None and in_all > 0 else None,
                "error_l1": error.l1 if error is not None and error.calls else None,
            }
        if not full:
            self.changed -= told
        return {
            "run": run.number,
            "prompt_id": run.prompt_id,
            "sampler_node": run.sampler_node,
            "model": run.model,
            "status": run.status,
            "steps": max(0, len(record.sigmas) - 1),
            "first_step": record.first_step or run.first_step,
            "step": self._step,
            "blocks": record.blocks,
            "doubles": record.doubles,
            "forwards": record.forwards,
            "repeated": record.repeated,
            "kinds": sorted(self._kinds, reverse=True),  # self, then cross
            "kernels": self.kernels,
            "cells": cells,
            "steps_left_out": left if full else 0,
            "times": times,
            "events": self._happenings(full),
            "notes": [note[:_MOST_LETTERS] for note in self._notes[-_MOST_EVENTS:]],
            "full": full,
        }

    def told(self) -> None:
        """Whatever `event` had to tell has been told to everybody."""
        self._told = {number: seen.count for number, (_, seen) in enumerate(self._happened)}
