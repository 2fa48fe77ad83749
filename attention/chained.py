"""A router behind another pack's override."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

from .link import HostFunction
from .router import Router
from .session import BUSY, CURRENT, Forward


class ChainedRouter(Router):
    """A router on a model that already had an override of another pack, which may change what attention means.

    The earlier override is called first and given a function that routes in the place of the host's own. Where it
    never calls that function the router is shadowed: the record counts such calls.
    """

    def __init__(self, earlier: Callable[..., torch.Tensor], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.earlier = earlier

    def __call__(self, func: HostFunction, *args: Any, **kwargs: Any) -> torch.Tensor:
        reached = False
        forward: Forward | None = None

        def routed(*inner: Any, **options: Any) -> torch.Tensor:
            nonlocal reached
            reached = True
            if is_compiling():
                return self.route(func, *inner, **options)
            token = CURRENT.set(forward)
            try:
                return self.route(func, *inner, **options)
            finally:
                CURRENT.reset(token)

        routed.__name__ = func.__name__
        if is_compiling():
            return self.earlier(routed, *args, **kwargs)
        forward = CURRENT.get()
        token = CURRENT.set(BUSY)  # what it calls of the host by itself is its own business
        try:
            out = self.earlier(routed, *args, **kwargs)
        finally:
            CURRENT.reset(token)
        if not reached and forward is not None:
            forward.shadowed += 1
        return out
