"""The state of one sampling run, and which run the current thread is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

import torch

from .call import View
from .kernel import Kernel, Run
from .record import Record, Trail

if TYPE_CHECKING:
    from .router import Router

HostFunction = Callable[..., torch.Tensor]


class Route:
    """A plan made ready to run: the loaded kernel and the views into and out of its layout.

    `run` None stands for the host's own attention; `trail` is how the plan came about.
    """

    __slots__ = ("dtype", "k_view", "kernel", "mask_shape", "out_dtype", "out_view", "q_view", "run", "trail", "v_view")

    def __init__(self, trail: Trail, kernel: Kernel | None = None, run: Run | None = None) -> None:
        self.trail = trail
        self.kernel = kernel
        self.run = run
        self.dtype: torch.dtype | None = None  # set where q, k, v differ: what to convert them to
        self.out_dtype: torch.dtype | None = None
        self.mask_shape: tuple[int, int, int, int] | None = None
        self.q_view: View | None = None
        self.k_view: View | None = None
        self.v_view: View | None = None
        self.out_view: View | None = None


class Session:
    """The state of one sampling run: its routes, the kernels that failed in it, and its record.

    Shared by the threads of a run; each change is one dictionary operation, and the record locks.
    """

    def __init__(self, router: Router) -> None:
        self.record = Record(router.policy)
        self._routes: dict[frozenset[int], dict[Any, Route]] = {}
        self._demoted: dict[Any, dict[str, str]] = {}

    def routes(self, active: frozenset[int]) -> dict[Any, Route]:
        """The routes known so far under these rules, by call key."""
        return self._routes.setdefault(active, {})

    def demoted(self, key: Any) -> Mapping[str, str]:
        """Kernel name → why it may not run the calls with this key any more."""
        return self._demoted.get(key, {})

    def demote(self, key: Any, kernel: str, reason: str) -> None:
        self._demoted.setdefault(key, {})[kernel] = reason
        for routes in list(self._routes.values()):
            routes.pop(key, None)


class Forward:
    """One pass through the model, in one thread: the rules in force, their routes, and the calls counted so far.

    A context manager: inside it, calls that carry no options and compiled graphs find this router through `CURRENT`.
    `takes_bare_calls` is False where another override stands in front of the router and must not be bypassed.
    """

    __slots__ = ("_token", "active", "counts", "router", "routes", "session", "shadowed", "takes_bare_calls")

    def __init__(
        self, router: Router, session: Session, active: frozenset[int], takes_bare_calls: bool = True
    ) -> None:
        self.router = router
        self.session = session
        self.active = active
        self.routes = session.routes(active)
        self.counts: Counter[Route] = Counter()
        self.shadowed = 0
        self.takes_bare_calls = takes_bare_calls
        self._token: Token[Forward | None] | None = None

    def __enter__(self) -> Forward:
        self._token = CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            CURRENT.reset(self._token)
        trails: Counter[Trail] = Counter()
        for route, count in self.counts.items():
            trails[route.trail] += count
        self.session.record.add_forward(trails, self.shadowed)


# The forward pass this thread is in, or None. Set per forward, outside any compiled region.
CURRENT: ContextVar[Forward | None] = ContextVar("attune_current_forward", default=None)
