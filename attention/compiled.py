"""Attention under `torch.compile`: one opaque operator that asks who is in charge when it runs, not when it is traced.

A decision made while tracing would be frozen into the graph: a rule by percent would hold for ever, a bypassed node
would go on. So a graph holds only this operator, without any handle to a router. When it runs it takes the current
forward pass from the context that the model wrapper sets outside the compiled region; where there is none it is the
host's own function, to the bit.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from .link import HostFunction
from .session import current_router

# The namespace is this module's own: two copies of the pack in one process must not define one operator twice. Inside
# ComfyUI the name is a path, with any letters in it.
_NAMESPACE = "attune_" + hashlib.sha256(__name__.encode()).hexdigest()[:16]
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, bool skip_reshape, bool skip_output_reshape, "
    "bool fp32_scores, float? scale, bool enable_gqa, bool low_precision, str func, int block, str block_type, "
    "int blocks, bool bare) -> Tensor",
    # In a CUDA graph the decision would be frozen after all: torch keeps operators with this tag out of them.
    tags=tuple(
        getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)
    ),
)
_UNKNOWN = -1
INNER = "__attune_inner__"  # where a function of ours that stands in a host function's place keeps that function


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_options: Any,
) -> torch.Tensor:
    """Attention with ComfyUI's signature on PyTorch's own SDPA, for where there is no host to ask."""
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (t.reshape(t.shape[0], t.shape[1], -1, dim).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return out if skip_output_reshape else out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


# The host's own functions by name, filled by host/: an operator's arguments cannot hold a function.
host_functions: dict[str, HostFunction] = {"plain_attention": plain_attention}


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    skip_reshape: bool,
    skip_output_reshape: bool,
    fp32_scores: bool,
    scale: float | None,
    enable_gqa: bool,
    low_precision: bool,
    func: str,
    block: int,
    block_type: str,
    blocks: int,
    bare: bool,
) -> torch.Tensor:
    options: dict[str, Any] = {}
    if block != _UNKNOWN:
        options["block_index"] = block
        options["block_type"] = block_type
    if blocks != _UNKNOWN:
        options["total_blocks"] = blocks
    kwargs: dict[str, Any] = {"transformer_options": options, "_inside_attn_wrapper": True}
    if scale is not None:
        kwargs["scale"] = scale
    if enable_gqa:
        kwargs["enable_gqa"] = True
    if not low_precision:
        kwargs["low_precision_attention"] = False
    function = host_functions[func]
    router = current_router(bare)
    attend = function if router is None else router.bound(function)
    precision = torch.float32 if fp32_scores else None
    out = attend(q, k, v, heads, mask, precision, skip_reshape, skip_output_reshape, **kwargs)
    # The graph was promised a fresh contiguous tensor.
    return out.contiguous() if out.data_ptr() != q.data_ptr() else out.clone()


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    skip_reshape: bool,
    skip_output_reshape: bool,
    *_rest: Any,
) -> torch.Tensor:
    if skip_reshape:
        batch, _, q_len, _ = q.shape
        v_dim = v.shape[-1]
    else:
        batch, q_len, width = q.shape
        v_dim = v.shape[-1] if v.ndim == 4 else width // heads
    if skip_output_reshape:
        return q.new_empty(batch, heads, q_len, v_dim)
    return q.new_empty(batch, q_len, heads * v_dim)


_LIBRARY.impl("attention", _run, "CompositeExplicitAutograd")
# Not by register_fake(): that one looks through the sources of every loaded module, 0.15 s in a ComfyUI.
_LIBRARY.impl("attention", _fake, "Meta")
_OPERATOR = getattr(torch.ops, _NAMESPACE).attention.default
_CARRIED = frozenset({"transformer_options", "scale", "enable_gqa", "low_precision_attention", "_inside_attn_wrapper"})


def traced_attention(
    func: HostFunction,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    bare: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """What `Router.__call__` becomes while a graph is traced. Same arguments, same meaning.

    `bare` says that the call did not come through the model's override. A call that the operator cannot carry goes to
    `func`: one with an argument it has no place for, one that wants gradients, one of another pack's function.
    """
    name = func.__name__
    carried = _CARRIED.issuperset(kwargs) and host_functions.get(name) is getattr(func, INNER, func)
    wants_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not carried or wants_gradient:
        return func(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **kwargs)
    options = kwargs.get("transformer_options") or {}
    index = options.get("transformer_index")
    if index is None:
        index = options.get("block_index")
    blocks = options.get("total_blocks")
    return _OPERATOR(  # type: ignore[no-any-return]
        q,
        k,
        v,
        mask,
        heads,
        skip_reshape,
        skip_output_reshape,
        attn_precision is torch.float32,
        kwargs.get("scale"),
        bool(kwargs.get("enable_gqa", False)),
        kwargs.get("low_precision_attention", True) is not False,
        name,
        _UNKNOWN if index is None else index,
        options.get("block_type") or "",
        _UNKNOWN if blocks is None else blocks,
        bare,
    )
