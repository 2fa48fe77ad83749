"""What really ran: per kernel and per node, with requested, planned and observed kept apart.

*Requested* is what a node's rule names, *planned* what `make_plan` decided (with every refusal), *observed* that the
kernel's own function returned.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .plan import OWN_DENSE, Decision
from .policy import Policy

Trail = tuple[Decision, ...]


@dataclass
class NodeRecord:
    """One node's share of a run: what it asked for, what ran for its calls, and what was refused (with call counts)."""

    requested: str
    observed: Counter[str] = field(default_factory=Counter)
    refused: dict[tuple[str, tuple[str, ...]], int] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        return sum(self.observed.values())

    def text(self) -> str:
        """One or a few short lines for the node's face."""
        if not self.calls:
            return "no attention call came to this rule: none matched it, or a later node decided them all"
        lines = [", ".join(f"{name} ×{count}" for name, count in self.observed.most_common())]
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
            "refused": [
                {"kernel": kernel, "reasons": list(reasons), "calls": count}
                for (kernel, reasons), count in self.refused.items()
            ],
            "text": self.text(),
        }


class Record:
    """The account of one sampling run. Filled after each forward, from any thread; readable at any time."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.forwards = 0
        self.shadowed = 0
        self.longest_self = 0  # tokens of the longest self attention met
        self._trails: Counter[Trail] = Counter()
        self._notes: dict[str, None] = {}
        self._lock = threading.Lock()

    def add(self, trails: Mapping[Trail, int], shadowed: int = 0, forwards: int = 0) -> None:
        """Add what was counted: completed calls per trail, calls that another override kept, forwards that ended."""
        with self._lock:
            self.forwards += forwards
            self.shadowed += shadowed
            self._trails.update(trails)

    def note(self, text: str) -> bool:
        """Keep a sentence for the user; True the first time it is said in this run."""
        with self._lock:
            new = text not in self._notes
            self._notes[text] = None
            return new

    @property
    def notes(self) -> list[str]:
        return list(self._notes)

    def trails(self) -> Counter[Trail]:
        with self._lock:
            return self._trails.copy()

    def observed(self) -> Counter[str]:
        """Completed calls per kernel name."""
        counts: Counter[str] = Counter()
        for trail, count in self.trails().items():
            counts[trail[-1].kernel] += count
        return counts

    def nodes(self) -> dict[str, NodeRecord]:
        """The record of every node that has a rule here, also of one that no call reached."""
        nodes: dict[str, NodeRecord] = {}
        wishes: defaultdict[str, list[str]] = defaultdict(list)
        for rule in self.policy.rules:
            wish = " / ".join(rule.kernels)
            node = nodes.setdefault(rule.source, NodeRecord(""))
            if not rule.exact_only and wish not in wishes[rule.source]:
                wishes[rule.source].append(wish)
                node.requested = ", ".join(wishes[rule.source])
        for trail, count in self.trails().items():
            for source in {decision.source for decision in trail} & nodes.keys():
                node = nodes[source]
                node.observed[trail[-1].kernel] += count
                for decision in trail:
                    if decision.source == source and not decision.accepted and OWN_DENSE not in decision.reasons:
                        refusal = (decision.kernel, decision.reasons)
                        node.refused[refusal] = node.refused.get(refusal, 0) + count
        return nodes
