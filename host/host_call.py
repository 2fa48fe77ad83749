"""One attention call as the host makes it, for those who only look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..attention.call import AttentionCall, Layout, describe, input_view
from ..measure.bench_inputs import Tensors


def block_of(options: Mapping[str, Any] | None, doubles: int) -> int | None:
    """The block that a call's options name, counted from 0 through the whole model; None where they name none."""
    options = options or {}
    block = options.get("transformer_index")
    if block is None:
        block = options.get("block_index")
        if block is not None and doubles and options.get("block_type") == "single":
            block += doubles
    return block if isinstance(block, int) else None


def describe_host_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    _skip_output_reshape: bool = False,
    *,
    doubles: int = 0,
    **options: Any,
) -> tuple[AttentionCall, Tensors]:
    """(the call, q, k and v as (B, H, tokens, D): views) of the host's arguments. Raises Undescribable."""
    call = describe(
        q,
        k,
        v,
        heads,
        mask=mask,
        skip_reshape=skip_reshape,
        scale=options.get("scale"),
        enable_gqa=bool(options.get("enable_gqa")),
        block=block_of(options.get("transformer_options"), doubles),
    )
    sizes = (
        (q, call.q_len, call.heads, call.head_dim),
        (k, call.kv_len, call.kv_heads, call.head_dim),
        (v, call.kv_len, call.kv_heads, call.v_dim),
    )
    seen = []
    for tensor, *size in sizes:
        shape, swap = input_view(tensor.ndim, skip_reshape, (call.batch, *size), Layout.BHND)
        tensor = tensor if shape is None else tensor.view(shape)
        seen.append(tensor.transpose(1, 2) if swap else tensor)
    return call, (seen[0], seen[1], seen[2])
