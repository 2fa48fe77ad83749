"""A router behind another pack's override."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

from .link import HostFunction
from .router import Router
from .session import CURRENT


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

        def routed(*inner: Any, **options: Any) -> torch.Tensor:
            nonlocal reached
            reached = True
            return self.route(func, *inner, **options)

        routed.__name__ = func.__name__
        out = self.earlier(routed, *args, **kwargs)
        if not reached and not is_compiling():
            forward = CURRENT.get()
            if forward is not None:
                forward.shadowed += 1
        return out
