"""The state of one sampling run (Session), of one forward pass in it (Forward), and which one a thread is in.

A Route is a plan made ready to run; a session keeps one for each kind of call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

import torch

from .call import AttentionCall, Shape, input_view, output_view
from .kernel import Kernel, Run
from .record import Record, Trail

if TYPE_CHECKING:
    from .router import Router


class Route:
    """A plan made ready to run: the loaded kernel and the views into and out of its layout.

    `run` None stands for the host's own attention; `trail` is how the plan came about.
    """

    __slots__ = (
        "dtype",
        "k_shape",
        "k_swap",
        "kernel",
        "mask_shape",
        "out_dtype",
        "out_shape",
        "out_swap",
        "q_shape",
        "q_swap",
        "run",
        "scale",
        "trail",
        "v_shape",
        "v_swap",
    )

    def __init__(self, trail: Trail, kernel: Kernel | None = None, run: Run | None = None) -> None:
        self.trail = trail
        self.kernel = kernel
        self.run = run
        self.scale: float | None = None
        self.dtype: torch.dtype | None = None  # set where q, k, v differ: what to convert them to
        self.out_dtype: torch.dtype | None = None
        self.q_shape: Shape | None = None
        self.k_shape: Shape | None = None
        self.v_shape: Shape | None = None
        self.mask_shape: Shape | None = None
        self.out_shape: Shape | None = None
        self.q_swap = self.k_swap = self.v_swap = self.out_swap = False

    def fit(self, call: AttentionCall, ndims: tuple[int, int, int], skip_reshape: bool, skip_output: bool) -> None:
        """Settle the views for calls like `call`, whose q, k, v have `ndims` dimensions."""
        assert self.kernel is not None
        layout = self.kernel.layout
        q = (call.batch, call.q_len, call.heads, call.head_dim)
        k = (call.batch, call.kv_len, call.kv_heads, call.head_dim)
        v = (call.batch, call.kv_len, call.kv_heads, call.v_dim)
        self.q_shape, self.q_swap = input_view(ndims[0], skip_reshape, q, layout)
        self.k_shape, self.k_swap = input_view(ndims[1], skip_reshape, k, layout)
        self.v_shape, self.v_swap = input_view(ndims[2], skip_reshape, v, layout)
        self.out_swap, self.out_shape = output_view(call, skip_output, layout)
        self.mask_shape = call.mask.shape if call.mask else None

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the kernel on the host's tensors, seen in its layout; the result is as the host wants it."""
        if self.dtype is not None:
            q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
        if self.q_shape is not None:
            q = q.view(*self.q_shape)
        if self.q_swap:
            q = q.transpose(1, 2)
        if self.k_shape is not None:
            k = k.view(*self.k_shape)
        if self.k_swap:
            k = k.transpose(1, 2)
        if self.v_shape is not None:
            v = v.view(*self.v_shape)
        if self.v_swap:
            v = v.transpose(1, 2)
        if mask is not None:
            mask = mask.view(*self.mask_shape)  # type: ignore[misc]
        out = self.run(q, k, v, mask=mask, scale=self.scale)  # type: ignore[misc]  # callers have checked it
        if self.out_swap:
            out = out.transpose(1, 2)
        if self.out_shape is not None:
            out = out.reshape(*self.out_shape)
        return out if self.out_dtype is None else out.to(self.out_dtype)


class Session:
    """The state of one sampling run: its routes, the kernels that failed in it, and its record.

    Shared by the threads of a run; each change is one dictionary operation, and the record locks.
    """

    def __init__(self, router: Router) -> None:
        self.record = Record(router.policy)
        self._routes: dict[frozenset[int], dict[Any, Route]] = {}
        self._demoted: dict[Any, dict[str, str]] = {}
        self._said: set[Any] = set()

    def routes(self, active: frozenset[int]) -> dict[Any, Route]:
        """The routes known so far under these rules, by call key."""
        return self._routes.setdefault(active, {})

    def demoted(self, key: Any) -> Mapping[str, str]:
        """Kernel name → why it may not run the calls with this key any more."""
        return self._demoted.get(key, {})

    def demote(self, key: Any, kernel: str, reason: str) -> None:
        """Never plan `kernel` again for calls with this key; what was planned so far is planned anew."""
        self._demoted.setdefault(key, {})[kernel] = reason
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
    `takes_bare_calls` is False where another override stands in front of the router and must not be bypassed.
    """

    __slots__ = ("_token", "active", "counts", "router", "routes", "session", "shadowed", "takes_bare_calls")

    def __init__(self, router: Router, session: Session, active: frozenset[int], takes_bare_calls: bool = True) -> None:
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
        self.flush(forwards=1)

    def flush(self, forwards: int = 0) -> None:
        """Hand what was counted so far to the record, and how many forwards have ended with it."""
        trails: Counter[Trail] = Counter()
        for route, count in list(self.counts.items()):
            trails[route.trail] += count
        self.session.record.add(trails, self.shadowed, forwards)
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
