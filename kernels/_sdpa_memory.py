"""What PyTorch's attention allocates, and when it writes the scores out."""

from __future__ import annotations

import torch

from ..attention.call import AttentionCall
from ._common import HALF, counts, lse_bytes, mask_count, padded_bytes, upright_bytes


def fused(dtype: torch.dtype, dim: int, v_dim: int, masked: bool, grouped: bool, flash: bool = True) -> bool:
    """Does a back end of torch on CUDA take this without writing the scores out? `flash` False: none of Flash's."""
    if flash and dtype in HALF and dim == v_dim <= 256 and not masked:
        return True
    return not grouped and dim % 8 == 0 and v_dim % 8 == 0


def fused_bytes(call: AttentionCall) -> int:
    copied = mask_count(call) * call.dtype.itemsize
    return lse_bytes(call) + copied + upright_bytes(call) + padded_bytes(call, -(-call.head_dim // 8) * 8)


def math_bytes(call: AttentionCall) -> int:
    # Everything in float32, keys and values once per query head; scores and weights side by side.
    q, k, v, out = counts(call)
    repeats = call.heads // call.kv_heads
    return 2 * call.score_bytes + 4 * (q + (k + v) * repeats + out) + upright_bytes(call)


def any_bytes(call: AttentionCall) -> int:
    kind = call.device.partition(":")[0]
    grouped = call.kv_heads != call.heads
    if kind == "cuda":
        lean = fused(call.dtype, call.head_dim, call.v_dim, call.mask is not None, grouped)
        if grouped and not lean and call.head_dim % 8 == 0 and call.v_dim % 8 == 0:
            repeated = sum(counts(call)[1:3]) * call.heads // call.kv_heads * call.dtype.itemsize
            return fused_bytes(call) + repeated
        return fused_bytes(call) if lean else math_bytes(call)
    if kind == "cpu" and call.head_dim != call.v_dim:
        return math_bytes(call)
    return fused_bytes(call)
