"""Scores that a processor asks for and mostly just multiplies with the values: not computed unless somebody looks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map

from ..attention.session import CURRENT
from .calls import without_scores

MULTIPLIES = "_attune_multiplies"  # of a processor's class: all it does with scores is to give them to our `bmm`


class Pending:
    """Softmaxed scores that nobody has computed: a product with the values is attention, anything else computes them.

    Stands for the (B·H, N, M) tensor of `get_attention_scores`, for processors that only multiply it.
    """

    def __init__(self, module: Any, q: torch.Tensor, k: torch.Tensor, mask: Any, original: Callable[..., Any]) -> None:
        self._module, self._q, self._k, self._mask, self._original = module, q, k, mask, original
        self._scores: torch.Tensor | None = None

    def _computed(self) -> torch.Tensor:
        if self._scores is None:
            self._scores = self._original(self._q, self._k, self._mask)
        return self._scores

    def _times(self, values: torch.Tensor) -> torch.Tensor:
        if self._scores is not None:  # somebody has seen them, and may have changed them
            return torch.bmm(self._scores, values)
        return without_scores(self._module, self._q, self._k, values, self._mask, joined=False).flatten(0, 1)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.bmm, torch.matmul) and not kwargs and isinstance(args[0], Pending):
            return args[0]._times(args[1])
        args, named = tree_map(
            lambda one: one._computed() if isinstance(one, Pending) else one, (args, dict(kwargs or {}))
        )
        return func(*args, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._computed(), name)

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        return self._times(other)


def _computing(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self._computed(), name)(*args)


_OPERATORS = (
    "add radd sub rsub mul rmul truediv neg pow iadd isub imul itruediv getitem setitem len lt le gt ge "
    "eq ne abs bool rtruediv rpow floordiv rfloordiv mod rmod"
)
for _name in _OPERATORS.split():
    setattr(Pending, f"__{_name}__", _computing(f"__{_name}__"))


def bmm(scores: Any, values: torch.Tensor, **more: Any) -> torch.Tensor:
    """What takes the place of torch.bmm in processors that only multiply what `get_attention_scores` gives them."""
    if not isinstance(scores, tuple):
        return torch.bmm(scores, values, **more)
    module, query, key, mask = scores
    return without_scores(module, query, key, values, mask, joined=False).flatten(0, 1)


def pending_scores(module: Any, original: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """What takes the place of a module's `get_attention_scores(query, key, attention_mask)` of (B·H, N, D) tensors."""

    @functools.wraps(original)
    def scores(query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        if is_compiling():  # nobody can be asked in a graph, and not every torch traces a Pending
            known = getattr(type(module.processor), MULTIPLIES, False) and query.ndim == key.ndim == 3
            return (module, query, key, attention_mask) if known else original(query, key, attention_mask)
        forward = CURRENT.get()
        if forward is None or forward.router is None or query.ndim != 3 or key.ndim != 3:
            return original(query, key, attention_mask)
        return Pending(module, query, key, attention_mask, original)

    return scores
