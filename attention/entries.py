"""What a record is made of: counts, errors and happenings."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class NodeRecord:
    """One node's share of a run: what it asked for, what ran for its calls, and what was refused (with call counts).

    `discarded` counts its calls in forwards that were thrown away and done again, by nobody's rule.
    """

    requested: str
    observed: Counter[str] = field(default_factory=Counter)
    refused: dict[tuple[str, tuple[str, ...]], int] = field(default_factory=dict)
    discarded: int = 0

    @property
    def calls(self) -> int:
        return sum(self.observed.values())

    def text(self) -> str:
        """One or a few short lines for the node's face."""
        again = f"{self.discarded} calls were no good and were done again on ComfyUI's own attention"
        if not self.calls:
            nothing = "no attention call came to this rule: none matched it, or a later node decided them all"
            return again if self.discarded else nothing
        lines = [", ".join(f"{name} ×{count}" for name, count in self.observed.most_common())]
        lines += [again] if self.discarded else []
        automatic = self.requested.startswith("auto")
        for (kernel, reasons), count in sorted(self.refused.items(), key=lambda item: -item[1])[:3]:
            if not automatic:
                lines.append(f"not {kernel} ×{count}: {'; '.join(reasons)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {
            "requested": self.requested,
            "calls": self.calls,
            "observed": dict(self.observed),
            "discarded": self.discarded,
            "refused": [
                {"kernel": kernel, "reasons": list(reasons), "calls": count}
                for (kernel, reasons), count in self.refused.items()
            ],
            "text": self.text(),
        }


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that did not go as planned: "fallback", "demotion", "repeat", "not attention" or "wait"."""

    kind: str
    text: str
    kernel: str = ""
    block: int | None = None
    call_kind: str = ""
    reason: str = ""


@dataclass
class Seen:
    """How often a Happening was met, and in which forward of the run (from 0) first."""

    forward: int
    count: int = 0


@dataclass
class Sampled:
    """Errors of single calls of one kernel, measured against float32: relative L1 and L2.

    `by_block` holds the largest L1 of each block. `unusable`: samples that gave no finite figure.
    """

    calls: int = 0
    unusable: int = 0
    l1: float = 0.0
    l2: float = 0.0
    largest_l1: float = 0.0
    largest_l2: float = 0.0
    by_block: dict[int | None, float] = field(default_factory=dict)

    def add(self, l1: float, l2: float, block: int | None) -> None:
        if not (math.isfinite(l1) and math.isfinite(l2)):
            self.unusable += 1
            return
        self.calls += 1
        self.l1 += (l1 - self.l1) / self.calls
        self.l2 += (l2 - self.l2) / self.calls
        self.largest_l1 = max(self.largest_l1, l1)
        self.largest_l2 = max(self.largest_l2, l2)
        self.by_block[block] = max(self.by_block.get(block, 0.0), l1)


@dataclass
class Calls:
    """Completed calls: those whose result was used, and those whose forward was thrown away.

    `forward` is that in which the first of them was. `again` of the kept ones were in the place of discarded ones.
    """

    forward: int
    kept: int = 0
    discarded: int = 0
    again: int = 0

    @property
    def first(self) -> int:
        """Calls that were planned like this before anything was done again."""
        return self.kept - self.again + self.discarded
