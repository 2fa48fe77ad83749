"""Which kernel ran where, out of a run's data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Place = tuple[int | None, str]  # block, kind


def step_cells(run: dict[str, Any]) -> dict[int, dict[Place, Counter[str]]]:
    """Step → (block, kind) → calls per kernel, of calls whose result was used."""
    found: dict[int, dict[Place, Counter[str]]] = {}
    for step in run["steps"]:
        cells: defaultdict[Place, Counter[str]] = defaultdict(Counter)
        for number, times in step["patterns"]:
            for block, kind, kernel, calls in run["patterns"][number]:
                cells[block, kind][kernel] += calls * times
        found[step["step"]] = dict(cells)
    return found


def in_ranges(numbers: Iterable[int]) -> str:
    """Numbers as "0-3, 7": sorted, each once."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


@dataclass
class Phase:
    """Steps that are alike, and what ran in them: (kernels, kind, blocks).

    Kernels are joined where several shared the calls; kind is "" where it made no difference.
    """

    steps: list[int]
    rows: list[tuple[str, str, list[int | None]]]


def phases(run: dict[str, Any]) -> list[Phase]:
    """The run in parts that are alike, in order."""
    found: list[Phase] = []
    for step, cells in sorted(step_cells(run).items()):
        rows: dict[tuple[str, str], list[int | None]] = {}
        for (block, kind), kernels in cells.items():
            rows.setdefault((" and ".join(sorted(kernels)), kind), []).append(block)
        for names in {names for names, _ in rows}:
            if rows.get((names, "self")) == (both := rows.get((names, "cross"))) is not None:
                del rows[names, "self"], rows[names, "cross"]
                rows[names, ""] = both
        listed = sorted((names, kind, blocks) for (names, kind), blocks in rows.items())
        if found and found[-1].rows == listed:
            found[-1].steps.append(step)
        else:
            found.append(Phase([step], listed))
    return found


def title(run: dict[str, Any]) -> str:
    """Which part of the sampling a run was: "steps 0-1 of 4"; what is not known is left out."""
    stage = run["stage"]
    first, steps = stage["first_step"], stage["steps"]
    if not steps:
        return f"{run['forwards']} forwards"
    whole = max(stage["steps_in_all"], first + steps)
    if first == 0 and steps == whole:
        return f"{steps} step{'s' if steps > 1 else ''}"
    return f"steps {first}-{first + steps - 1} of {whole}" if steps > 1 else f"step {first} of {whole}"


def kernel_summary(runs: Iterable[dict[str, Any]]) -> str:
    """The kernels that ran, by number of calls: "split ×8, host ×2"."""
    counts: Counter[str] = Counter()
    for run in runs:
        counts.update(run["observed"])
    return ", ".join(f"{name} ×{count:,}" for name, count in counts.most_common() if count)
