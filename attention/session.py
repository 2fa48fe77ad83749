"""The state of one sampling run (Session), of one forward pass in it (Forward), and which one a thread is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

import torch

from .call import AttentionCall
from .check import Check
from .guard import Finding, Place, Sampler, Watch
from .policy import Rule
from .record import Record, Trail
from .route import Route
from .trial import Turn
from .tuner import Tuner

if TYPE_CHECKING:
    from .router import Router


class Session:
    """The state of one sampling run: its routes, the kernels that failed in it, and its record.

    Shared by the threads of a run; each change is one dictionary operation, and the record locks. Which kernels may be
    called is asked once per run and device, so that a run ends with the kernels it began with.
    """

    def __init__(self, router: Router, endless: bool = False) -> None:
        """`endless`: for calls outside any run, between which there are no boundaries."""
        self.record = Record(router.policy)
        self.record.endless = endless
        self.tuner = Tuner(router.kernels, router.machine, router.link, self.record, measures=not endless)
        self._link = router.link
        self._refused: dict[str, Mapping[str, str]] = {}
        self._routes: dict[frozenset[int], dict[Any, Route]] = {}
        self._demoted: dict[Any, dict[str, str]] = {}
        self._blamed: dict[Place, dict[str, str]] = {}
        self._banned: dict[str, str] = {}
        self.findings: list[Finding] = []  # what was found in this run, to be remembered for the next
        self.sampler = Sampler()
        self.levels: dict[float, float] = {}  # percent / 100 → noise level: asking may read the device
        self.beyond_help = False  # the model's own numbers are not finite, with any attention
        self.riddles = 0  # forwards with NaN whose culprit could not be found
        self._said: set[Any] = set()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Session:
        return self  # it travels in the options of a run, which other packs may copy

    def routes(self, active: frozenset[int]) -> dict[Any, Route]:
        """The routes known so far under these rules, by call key."""
        return self._routes.setdefault(active, {})

    def refused(self, device: str) -> Mapping[str, str]:
        """Kernel name → why it may not be called on this device during this run, whatever the call."""
        refused = self._refused.get(device)
        if refused is None:  # never asked, or `ask_again` came from the thread of the probe just now
            refused = self._refused[device] = self._link.refused(device)
        return refused

    def ask_again(self) -> None:
        """Forget what `refused` was told, and every plan made with it."""
        self._refused.clear()
        self.plan_anew()

    def demoted(self, key: Any) -> Mapping[str, str]:
        """Kernel name → why it may not run the calls with this key any more."""
        return self._demoted.get(key, {})

    def demote(self, key: Any, kernel: str, reason: str) -> None:
        """Never plan `kernel` again for calls with this key; what was planned so far is planned anew."""
        self._demoted.setdefault(key, {})[kernel] = reason
        self.plan_anew()

    def unfit(self, call: AttentionCall) -> dict[str, str]:
        """Kernel name → why the guard keeps it from such calls."""
        return {**self._blamed.get(Place.of(call), {}), **self._banned}

    def blame(self, finding: Finding, remembered: bool = False) -> None:
        """Never plan a kernel again for the calls it failed for. `remembered`: it did so in an earlier run."""
        earlier = (
            "in an earlier run or stage of such a model ('Probe again' in ComfyUI's tab Attention gives it a new "
            "chance, or `attune cache clear --verdicts`)"
        )
        why = f"{finding.reason} {earlier}" if remembered else finding.reason
        kernels = self._blamed.setdefault(finding.place, {})
        if not remembered and finding.kernel not in kernels:
            self.findings.append(finding)
        kernels[finding.kernel] = why
        self.plan_anew()

    def ban(self, kernel: str, reason: str) -> None:
        """Never plan `kernel` again in this run."""
        self._banned[kernel] = reason
        self.plan_anew()

    def plan_anew(self) -> None:
        """Forget the routes: each call is planned again."""
        for routes in list(self._routes.values()):
            routes.clear()

    def first_time(self, what: Any) -> bool:
        """True the first time this is asked about `what` in this run."""
        new = what not in self._said
        self._said.add(what)
        return new


class Forward:
    """One pass through the model, in one thread: the rules in force, their routes, and the calls counted so far.

    A context manager: inside it, calls that carry no options and compiled graphs find this router through `CURRENT`.
    `takes_bare_calls` is False where another override stands in front of the router and must not be bypassed. `guard`
    sees the output of every guarded route. `rules` take the place of the policy's: for a forward that is repeated, in
    which every output is seen. `held`: the counts wait for `flush`, until it is known what they are worth. `turn`: what
    this forward measures for `auto`.
    """

    __slots__ = (
        "_token",
        "active",
        "clock",
        "counts",
        "guard",
        "held",
        "inside",
        "router",
        "routes",
        "rules",
        "session",
        "shadowed",
        "sigma",
        "takes_bare_calls",
        "turn",
    )

    def __init__(
        self,
        router: Router,
        session: Session,
        active: frozenset[int],
        takes_bare_calls: bool = True,
        *,
        guard: Watch | Check | None = None,
        rules: Sequence[Rule] | None = None,
        sigma: torch.Tensor | None = None,
        held: bool = False,
        turn: Turn | None = None,
    ) -> None:
        self.router = router
        self.session = session
        self.active = active
        self.clock = session.record.clock
        self.guard = guard
        self.rules = rules
        self.sigma = sigma
        self.held = held
        self.turn = turn
        self.inside = False  # True: a forward inside this one counts
        self.routes = session.routes(active) if rules is None else {}
        self.counts: Counter[Route] = Counter()
        self.shadowed = 0
        self.takes_bare_calls = takes_bare_calls
        self._token: Token[Forward | None] | None = None

    def __enter__(self) -> Forward:
        self._token = CURRENT.set(self)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._token is not None:
            CURRENT.reset(self._token)
        if not self.held or kind is not None:
            self.flush(forwards=0 if self.inside else 1)

    def flush(self, forwards: int = 0, discarded: bool = False) -> None:
        """Hand what was counted so far to the record, and how many forwards have ended with it.

        `discarded`: the forward's result was thrown away.
        """
        calls: Counter[tuple[Trail, int | None, str]] = Counter()
        for route, count in list(self.counts.items()):
            call = route.call
            calls[route.trail, call.block if call else None, call.kind if call else "self"] += count
        self.session.record.add(calls, self.shadowed, forwards, sigma=self.sigma, discarded=discarded)
        self.counts.clear()
        self.shadowed = 0


class _Busy:
    """Stands in `CURRENT` while the host, or another pack's override, computes a call by itself."""

    router: Router | None = None
    takes_bare_calls = False


BUSY: Any = _Busy()

# The forward pass this thread is in, or None. Set per forward, outside any compiled region.
CURRENT: ContextVar[Forward | None] = ContextVar("attune_current_forward", default=None)


_default: Router | None = None


def set_default_router(router: Router | None) -> None:
    """Give the calls that no run claims to `router`; there is one only where the environment asks for it."""
    global _default
    _default = router


def current_router(bare: bool) -> Router | None:
    """Who routes a call in this thread now, or None. `bare`: it did not come through the override of a model."""
    forward = CURRENT.get()
    if forward is None:
        return _default
    return forward.router if forward.takes_bare_calls or not bare else None
