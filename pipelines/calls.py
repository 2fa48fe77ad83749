"""Where a pipeline's attention calls leave diffusers: SDPA calls, score tensors, and modules that attend by themselves.

Each of them is described to the router as a call with heads, (B, H, N, D). Where no router is in charge (outside a
forward of a covered model, or inside a kernel) the original runs, untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from ..attention.compiled import plain_attention, traced_attention
from ..attention.session import CURRENT
from ..kernels.split import run as sliced

SDPA = F.scaled_dot_product_attention
# The attention module that this thread is in: its block (as the router wants it), and the back end it had before.
PLACE: ContextVar[Mapping[str, Any] | None] = ContextVar("attune_place", default=None)
_PARTS, _LONG = 4, 2**24  # parts of a call with that many scores per head, see without_scores
_WATCHING: ContextVar[bool] = ContextVar("attune_watching", default=False)
_ROUTED: ContextVar[bool] = ContextVar("attune_routed", default=False)  # in a call of ours: kernels call SDPA, too


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast makes of SDPA's inputs on this kind of device; None where it does nothing."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except RuntimeError:  # a kind of device that autocast does not know, as "meta"
        return None


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As autocast does it: integers, booleans and float64 stay what they are."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype is not torch.float64 else tensor


def _route(
    original: Callable[[], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    fp32_scores: bool = False,
    joined: bool = False,
    **arguments: Any,
) -> torch.Tensor:
    """Hand a call to the router in charge; q, k, v are (B, H, N, D), the mask has four dimensions.

    joined: the result is (B, N, H·D) instead of (B, H, N, D). `arguments` are the call's others, as SDPA names them.
    """
    forward = None if is_compiling() else CURRENT.get()
    if not is_compiling() and (forward is None or forward.router is None):
        return original()
    device, precision = q.device.type, torch.float32 if fp32_scores else None
    if (narrow := _autocast_dtype(device)) is not None:
        # SDPA is among the operators that autocast narrows, other kernels are not; nor may what they compute be.
        q, k, v = (_narrowed(t, narrow) for t in (q, k, v))
        mask = None if mask is None else _narrowed(mask, narrow)
    if forward is None or forward.router is None:  # in a graph
        if set(arguments) - {"scale", "enable_gqa"}:
            return original()
        heads = q.shape[1]
        return traced_attention(plain_attention, q, k, v, heads, mask, precision, True, not joined, **arguments)

    def host(*_given: Any, **_more: Any) -> torch.Tensor:
        with torch.autocast(device, narrow) if narrow is not None else nullcontext():
            return original()

    options, token = PLACE.get(), _ROUTED.set(True)
    try:
        with torch.autocast(device, enabled=False) if narrow is not None else nullcontext():
            return forward.router(
                host,
                q,
                k,
                v,
                q.shape[1],
                mask,
                precision,
                True,
                not joined,
                transformer_options=options,
                **arguments,
            )
    finally:
        _ROUTED.reset(token)


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    host: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """What takes the place of F.scaled_dot_product_attention, whose meaning and arguments it has.

    host: what computes the call where the router leaves it to the pipeline; SDPA itself if not given.
    """

    def original() -> torch.Tensor:
        if host is not None:
            return host()
        more = {"enable_gqa": True} if enable_gqa else {}  # torch 2.4 does not know it
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)

    if not (isinstance(query, torch.Tensor) and query.ndim == key.ndim == value.ndim and query.ndim in (3, 4)):
        return original()
    arguments: dict[str, Any] = {}
    if scale is not None:
        arguments["scale"] = scale
    if enable_gqa:
        arguments["enable_gqa"] = True
    if is_causal:  # the pack describes no such calls: only the original takes them
        arguments["is_causal"] = True
    if dropout_p:
        arguments["dropout_p"] = dropout_p
    mask = attn_mask
    if query.ndim == 3:  # (B, N, D): one head
        if mask is not None:
            mask = mask[:, None] if mask.ndim == 3 else mask[(None,) * (4 - mask.ndim)]
        out = _route(lambda: original()[:, None], query[:, None], key[:, None], value[:, None], mask, **arguments)
        return out[:, 0]
    if mask is not None and mask.ndim < 4:  # missing dimensions are the first ones, as torch broadcasts
        mask = mask[(None,) * (4 - mask.ndim)]
    return _route(original, query, key, value, mask, **arguments)


class Intercept(TorchFunctionMode):
    """Sends the SDPA calls of this thread, and of nobody else, through `sdpa`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is SDPA and (is_compiling() or not _ROUTED.get()):
            return sdpa(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)


@contextmanager
def intercepted() -> Iterator[None]:
    """Inside it, this thread's SDPA calls are routed, whoever makes them."""
    if _WATCHING.get():
        yield
        return
    token = _WATCHING.set(True)
    try:
        with Intercept():
            yield
    finally:
        _WATCHING.reset(token)


# Modules whose tensors are (B·H, N, D)


def _by_heads(module: Any, q: torch.Tensor, mask: torch.Tensor | None) -> tuple[int, torch.Tensor | None]:
    """(heads, the mask in four dimensions) for tensors of (B·H, N, D); a part of a batch counts as one head each."""
    heads = int(module.heads)
    heads = heads if q.shape[0] % heads == 0 else 1
    if mask is None or mask.ndim == 4:
        return heads, mask
    if mask.ndim < 3:
        return heads, mask[(None,) * (4 - mask.ndim)]
    # (B·H, N, M), or one that broadcasts to it
    return heads, mask[None] if mask.shape[0] == 1 else mask.reshape(-1, heads, *mask.shape[1:])


def _wide(module: Any, q: torch.Tensor) -> bool:
    asked = getattr(module, "upcast_attention", False) or getattr(module, "upcast_softmax", False)
    return bool(asked) and q.dtype is not torch.float32


def without_scores(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    joined: bool,
) -> torch.Tensor:
    """Attention of (B·H, N, D) tensors by the router; what it falls back to is SDPA: never a (B·H, N, M) tensor."""
    heads, mask = _by_heads(module, q, mask)
    dtype, wide, given = q.dtype, _wide(module, q), getattr(module, "scale", None)
    scale = None if given is None else float(given)
    q, k, v = (t.reshape(-1, heads, *t.shape[1:]) for t in (q, k, v))  # views; unflatten() is nothing for a full graph
    if mask is not None and mask.dtype not in (torch.bool, dtype):
        mask = mask.to(dtype)
    # While the router leaves a call to us it is not there.
    session = None if is_compiling() else getattr(CURRENT.get(), "session", None)

    def attend(some: slice, joined: bool) -> torch.Tensor:
        """The call for some of the heads."""
        queries, keys, values = q[:, some], k[:, some], v[:, some]
        bias = mask[:, some] if mask is not None and mask.shape[1] > 1 else mask

        def plain() -> torch.Tensor:
            a, b, c, added = queries, keys, values, bias
            if wide:
                a, b, c = a.float(), b.float(), c.float()
                added = bias.float() if bias is not None and bias.is_floating_point() else bias
                if session is not None:
                    more = 4 * (a.numel() + b.numel() + c.numel()) / 2**20
                    said = f"upcast_attention: SDPA got float32 copies of its inputs, up to {more:,.1f} MiB"
                    session.record.note(said)
            if a.is_cuda and a.shape[3] % 8:  # SDPA has no fused kernel for that, and would write the scores out
                out = sliced(a, b, c, mask=added, scale=scale)
            else:
                out = SDPA(a, b, c, attn_mask=added, scale=scale)
            out = out.to(dtype)
            # Its strides are whatever the kernel left: a copy where need be.
            return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1) if joined else out

        named = {} if scale is None else {"scale": scale}
        return _route(plain, queries, keys, values, bias, fp32_scores=wide, joined=joined, **named).to(dtype)

    everything = slice(0, heads)
    if not joined or heads < _PARTS or q.shape[2] * k.shape[2] < _LONG:
        return attend(everything, joined)
    # Joining the heads may copy the result: of a long call a part at a time, so that it is never there twice.
    out = torch.empty(q.shape[0], q.shape[2], heads, v.shape[3], dtype=dtype, device=q.device)
    for some in (slice(start, start + heads // _PARTS) for start in range(0, heads, heads // _PARTS)):
        out[:, :, some] = attend(some, False).transpose(1, 2)
    return out.flatten(2)


def own_attention(module: Any, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What takes the place of a module's `_attention(query, key, value, attention_mask)`.

    Tensors are (B·H, N, D), (B·H, M, D); the mask, added to the scores, broadcasts to (B·H, N, M). Returns (B, N, H·D).
    """

    @functools.wraps(original)
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *rest: Any,
        **more: Any,
    ) -> torch.Tensor:
        fits = query.ndim == key.ndim == value.ndim == 3 and query.shape[0] % int(module.heads) == 0
        # In a graph nobody can be asked: what is called there asks when it runs.
        routed = is_compiling() or getattr(CURRENT.get(), "router", None) is not None
        if not (fits and routed):
            return original(query, key, value, attention_mask, *rest, **more)
        return without_scores(module, query, key, value, attention_mask, joined=True)

    return attend
