"""What really ran in one sampling run, with requested, planned and observed kept apart.

*Requested* is what a node's rule names, *planned* what `make_plan` decided first for a call (with every refusal),
*observed* that the kernel's own function returned, for a result that went into the picture. Calls of a forward that
was thrown away and repeated are *discarded*.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .clock import Clock, Timing
from .entries import Calls, Happening, NodeRecord, Sampled, Seen
from .history import Cell, History
from .plan import OWN_DENSE, Decision
from .policy import Policy

log = logging.getLogger("attune")
Trail = tuple[Decision, ...]
_MOST_EVENTS = 500
_MOST_TRAILS = 5000
# How a reason that a kernel got in the middle of a run begins, or what it holds: it was planned, and then given up.
_DEMOTED = ("raised ", "ran out of memory")
_DEMOTED_HERE = "times in this run"


class Record:
    """The account of one sampling run. Filled after each forward, from any thread; readable at any time.

    The host sets what it knows: `sigmas` (noise levels of this run's steps, one more than there are steps) and
    `first_step` (the number of its first step in the whole sampling), `blocks` and, in models that count two kinds of
    blocks, `doubles`, and `clock`, where calls are to be timed. `close` ends it. A record that never ends (`endless`)
    keeps no steps.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.sigmas: Sequence[float] = ()
        self.first_step = 0
        self.blocks: int | None = None
        self.doubles = 0
        self.clock: Clock | None = None
        self.endless = False
        self.forwards = 0
        self.repeated = 0  # forwards that were thrown away and done again
        self.measuring = 0.0  # seconds that `auto` took to measure kernels beside the run
        self.shadowed = 0
        self.longest_self = 0  # tokens of the longest self attention met
        self.devices: dict[str, None] = {}  # where forwards ran, as torch writes them
        self.history = History()
        self.times: dict[str, Timing] = {}  # per kernel, from `close` on
        self.errors: dict[str, Sampled] = {}  # per kernel
        self.closed = False
        self.unlisted = 0  # happenings beyond the first 500
        self._calls: dict[tuple[Trail, int | None, str], Calls] = {}
        self._happened: dict[Happening, Seen] = {}
        self._demoted: set[tuple[str, str]] = set()
        self._discarded = -1  # the forward that was thrown away last
        self._notes: dict[str, None] = {}
        self._lock = threading.Lock()

    def add(
        self,
        calls: Mapping[tuple[Trail, int | None, str], int],
        shadowed: int = 0,
        forwards: int = 0,
        *,
        sigma: torch.Tensor | None = None,
        discarded: bool = False,
    ) -> None:
        """Add what was counted in one forward, or a part of one.

        calls: completed calls by (trail, block, kind). shadowed: calls that another override kept. forwards: forwards
        that ended with it. sigma: the noise level, 0-dim and perhaps on a device; not read before `close`. discarded:
        the result was thrown away, and the forward is done again under the same number.
        """
        with self._lock:
            cells: Counter[Cell] = Counter()
            for key, count in calls.items():
                trail, block, kind = key
                cells[Cell(block, kind, trail[-1].kernel)] += count
                if key not in self._calls and len(self._calls) >= _MOST_TRAILS:
                    key = (trail[-1:], None, kind)  # Reasons may hold figures that are new in each plan.
                entry = self._calls.setdefault(key, Calls(self.forwards))
                if discarded:
                    entry.discarded += count
                else:
                    entry.kept += count
                    entry.again += count if self._discarded == self.forwards else 0
            if isinstance(sigma, torch.Tensor):
                self.devices[str(sigma.device)] = None
            if not self.closed and not self.endless:
                self.history.add(self.forwards, cells, sigma, discarded)
            self.shadowed += shadowed
            if discarded:
                self.repeated += self._discarded != self.forwards
                self._discarded = self.forwards
            else:
                self.forwards += forwards

    def event(
        self, kind: str, text: str, *, kernel: str = "", block: int | None = None, call_kind: str = "", reason: str = ""
    ) -> None:
        """Something did not go as planned (see Happening), in the forward whose calls are added next."""
        what = Happening(kind, text, kernel, block, call_kind, reason)
        with self._lock:
            if kind == "demotion":
                self._demoted.add((kernel, reason))
            if what not in self._happened and len(self._happened) >= _MOST_EVENTS:
                self.unlisted += 1
                return
            self._happened.setdefault(what, Seen(self.forwards)).count += 1

    def sampled(self, kernel: str, l1: float, l2: float, block: int | None) -> None:
        """The error of one call of `kernel`, as relative L1 and L2 against float32."""
        with self._lock:
            self.errors.setdefault(kernel, Sampled()).add(l1, l2, block)

    def note(self, text: str) -> bool:
        """Keep a sentence for the user; True the first time it is said in this run."""
        with self._lock:
            new = text not in self._notes
            self._notes[text] = None
            return new

    def close(self) -> None:
        """The run is over, in whatever way: read what waits on the device. Never raises; once is enough."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        try:
            self.history.close(self.sigmas, self.first_step)
            if self.clock is not None:
                self.times = self.clock.read()
        except Exception:  # the account of a run must never cost the run
            log.exception("The record of a sampling run could not be completed")

    @property
    def notes(self) -> list[str]:
        return list(self._notes)

    def calls(self) -> dict[tuple[Trail, int | None, str], Calls]:
        """Completed calls by how their plan came about, block and kind."""
        with self._lock:
            return {key: replace(count) for key, count in self._calls.items()}

    def happened(self) -> dict[Happening, Seen]:
        with self._lock:
            return {what: Seen(seen.forward, seen.count) for what, seen in self._happened.items()}

    def trails(self) -> Counter[Trail]:
        """Completed calls whose result was used, by how their plan came about."""
        counts: Counter[Trail] = Counter()
        for (trail, _, _), count in self.calls().items():
            if count.kept:
                counts[trail] += count.kept
        return counts

    def observed(self) -> Counter[str]:
        """Completed calls whose result was used, per kernel name."""
        counts: Counter[str] = Counter()
        for trail, count in self.trails().items():
            counts[trail[-1].kernel] += count
        return counts

    def planned(self, trail: Trail) -> str:
        """The kernel that the first plan chose: the first that was accepted, or was only demoted later in the run."""
        for decision in trail:
            if decision.accepted or any(
                (decision.kernel, reason) in self._demoted or reason.startswith(_DEMOTED) or _DEMOTED_HERE in reason
                for reason in decision.reasons
            ):
                return decision.kernel
        return trail[-1].kernel

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
        for (trail, _, _), calls in self.calls().items():
            for source in {decision.source for decision in trail} & nodes.keys():
                nodes[source].discarded += calls.discarded
        return nodes
