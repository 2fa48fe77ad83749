"""Which kernel ran in which block at which step of one run: kept small while it goes on, put in order when it is over.

Most forward passes of a run are alike, so the calls of one are kept as a pattern, and a forward is one number. The
noise levels stay on the device until `close`: reading one makes the device wait.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

_MOST_FORWARDS = 20_000
_MOST_ROWS = 100_000  # of all patterns together


class Cell(NamedTuple):
    """Calls of one kind ("self", "cross") in one block, and the kernel that computed them."""

    block: int | None
    kind: str
    kernel: str


Pattern = tuple[tuple[Cell, int], ...]


class _Pass(NamedTuple):
    """What was counted of one forward pass. Its first try and its repetition have one number."""

    forward: int
    pattern: int
    discarded: bool
    sigma: torch.Tensor | float | None


@dataclass
class Step:
    """One step: its noise level where it is known, its forwards, and how often each pattern ran in it.

    `discarded`: patterns of passes whose result was thrown away.
    """

    number: int
    sigma: float | None
    forwards: int = 0
    kept: Counter[int] = field(default_factory=Counter)
    discarded: Counter[int] = field(default_factory=Counter)


def _order(row: tuple[Cell, int]) -> tuple[bool, int, str, str]:
    cell = row[0]
    return cell.block is None, cell.block or 0, cell.kind, cell.kernel


def read_sigmas(sigmas: Sequence[torch.Tensor | float | None]) -> list[float | None]:
    """The numbers behind `sigmas` (0-dim tensors), in float32: one reading per device; None where it fails."""
    numbers: list[float | None] = [None] * len(sigmas)
    tensors: defaultdict[torch.device, list[int]] = defaultdict(list)
    for place, sigma in enumerate(sigmas):
        if isinstance(sigma, torch.Tensor):
            tensors[sigma.device].append(place)
        elif sigma is not None:
            numbers[place] = float(torch.tensor(float(sigma), dtype=torch.float32))
    for places in tensors.values():
        try:
            parts = [sigmas[place].detach().reshape(()).float() for place in places]  # type: ignore[union-attr]
            read: list[float] = torch.stack(parts).tolist()
        except Exception:  # the device is lost, or somebody's tensor is none that can be read
            continue
        for place, number in zip(places, read, strict=True):
            numbers[place] = number if math.isfinite(number) else None
    return numbers


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The index of the step in `sigmas` (float32, both ends of each step) that a forward at `sigma` belongs to.

    sigma_i ≥ sigma > sigma_{i+1}, the other way round where the noise rises. Above the first it is the first step:
    samplers that add noise (s_churn) go there. Below the last it is the last one.
    """
    rising = sigmas[0] < sigmas[-1]
    for index in range(len(sigmas) - 1):
        begin, end = sigmas[index], sigmas[index + 1]
        if (begin <= sigma < end) if rising else (begin >= sigma > end):
            return index
    beyond = sigma < sigmas[0] if rising else sigma > sigmas[0]
    return 0 if beyond else len(sigmas) - 2


class History:
    """The forwards of one run. `left_out` counts those for which there was no room: their calls have no place here."""

    def __init__(self) -> None:
        self.patterns: list[Pattern] = []
        self.steps: list[Step] = []
        self.left_out = 0
        self._numbers: dict[frozenset[tuple[Cell, int]], int] = {}
        self._rows = 0
        self._passes: list[_Pass] = []
        self._step_of_forward: dict[int, int] = {}

    def add(
        self, forward: int, calls: Mapping[Cell, int], sigma: torch.Tensor | float | None, discarded: bool = False
    ) -> None:
        """The calls of pass number `forward`, or of a part of it. `sigma` is not read before `close`."""
        key = frozenset(calls.items())
        number = self._numbers.get(key)
        full = number is None and self._rows + len(key) > _MOST_ROWS
        if full or len(self._passes) >= _MOST_FORWARDS:
            self.left_out += 1
            return
        if number is None:
            number = self._numbers[key] = len(self.patterns)
            self.patterns.append(tuple(sorted(calls.items(), key=_order)))
            self._rows += len(key)
        self._passes.append(_Pass(forward, number, discarded, sigma))

    def passes(self, since: int = 0) -> list[tuple[int, int, bool]]:
        """(forward, number of its pattern, was it discarded?) of the passes from number `since` on; none after `close`.

        For who looks on from another thread while the run goes on: nothing is read from a device.
        """
        return [one[:3] for one in self._passes[since:]]

    def close(self, sigmas: Sequence[float], first_step: int = 0) -> None:
        """Read the noise levels and put every pass into its step; afterwards nothing is left on a device.

        `sigmas`: noise levels of the run's steps, one more than there are steps. Without them, or where a pass has
        none, a step is a forward.
        """
        passes, self._passes = self._passes, []
        levels = torch.tensor(list(sigmas), dtype=torch.float32).tolist() if len(sigmas) > 1 else []
        known: dict[float, int] = {}
        steps: dict[int, Step] = {}
        forwards: defaultdict[int, set[int]] = defaultdict(set)
        read = read_sigmas([one.sigma for one in passes])
        last = first_step
        for one, sigma in zip(passes, read, strict=True):
            if not levels:
                number = first_step + one.forward
            elif sigma is None:
                number = last
            else:
                if sigma not in known:
                    known[sigma] = first_step + step_of(sigma, levels)
                number = known[sigma]
            last = number
            self._step_of_forward[one.forward] = number
            step = steps.setdefault(number, Step(number, sigma))
            if one.discarded:
                step.discarded[one.pattern] += 1
            else:
                step.kept[one.pattern] += 1
                forwards[number].add(one.forward)
        for number, step in steps.items():
            step.forwards = len(forwards[number])
        self.steps = [steps[number] for number in sorted(steps)]

    def step_of_forward(self, forward: int) -> int | None:
        """The step that a forward was put into; None where it has none, and before `close`."""
        return self._step_of_forward.get(forward)
