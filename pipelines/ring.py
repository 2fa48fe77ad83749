"""One step of ring attention: a call on some of the keys, by a kernel that gives its log-sum-exp as well.

diffusers joins the steps. For the router a step is a call like any other, of kernels that are asked for both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace

import torch

from ..attention.call import AttentionCall
from ..attention.kernel import Kernel, Run, RunLse
from ..attention.machine import Machine
from ..attention.router import Router
from ..attention.session import CURRENT, Forward
from .calls import sdpa

_STEPS = -1  # among the rules in force: routes of steps are kept apart from those of other calls
_lse: ContextVar[torch.Tensor | None] = ContextVar("attune_lse", default=None)  # (B, H, N), of the call that ran last
_routers: weakref.WeakKeyDictionary[Router, Router] = weakref.WeakKeyDictionary()
Host = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def _gives_none(_call: AttentionCall, _machine: Machine) -> str:
    return "gives no log-sum-exp, by which ring attention joins its steps"


def _noting(load_lse: Callable[[], RunLse]) -> Callable[[], Run]:
    def load() -> Run:
        run_lse = load_lse()

        def run(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            mask: torch.Tensor | None = None,
            scale: float | None = None,
        ) -> torch.Tensor:
            out, lse = run_lse(q, k, v, mask=mask, scale=scale)
            _lse.set(lse)
            return out

        return run

    return load


def _for_steps(kernel: Kernel) -> Kernel:
    if kernel.load_lse is None:
        return replace(kernel, needs=replace(kernel.needs, call_rules=(_gives_none,)))
    return replace(kernel, load=_noting(kernel.load_lse))


def _router(router: Router) -> Router:
    """The same rules, for kernels that leave their log-sum-exp in `_lse`."""
    found = _routers.get(router)
    if found is None:
        kernels = {name: _for_steps(kernel) for name, kernel in router.kernels.items()}
        found = _routers[router] = Router(router.policy, kernels, router.machine, router.link)
    return found


def step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    scale: float | None,
    host: Host,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output (B, N, H, D), log-sum-exp (B, N, H) in float32) of (B, N, H, D) tensors, routed as the forward says.

    host: what computes both where the router leaves the call to the pipeline.
    """
    forward = CURRENT.get()
    if forward is None or forward.router is None:
        return host()
    inner = Forward(_router(forward.router), forward.session, forward.active, guard=forward.guard, rules=forward.rules)
    if forward.rules is None:
        inner.routes = forward.session.routes(frozenset({*forward.active, _STEPS}))
    inner.counts = forward.counts  # they are calls of that forward

    def left() -> torch.Tensor:
        out, lse = host()
        _lse.set(lse.transpose(1, 2))
        return out.transpose(1, 2)

    token = CURRENT.set(inner)
    try:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = sdpa(q, k, v, mask, dropout_p, scale=scale, host=left)
        lse = _lse.get()
    finally:
        CURRENT.reset(token)
        _lse.set(None)
    assert lse is not None
    return out.transpose(1, 2), lse.transpose(1, 2)
