"""Attention in float32 or float64, straight from the definition: what every kernel is compared with."""

from __future__ import annotations

import torch

_SCORES = 2**24  # numbers in one slice of scores: 64 MiB in float32


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """softmax(scale · Q Kᵀ + mask) V in `dtype`, sliced over queries so that scores stay below 64 MiB.

    q is (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) with H a multiple of Hkv; mask is bool (True = may attend)
    or float (added), broadcastable to (B, H, N, M); `scale` None means 1/sqrt(D). Returns (B, H, N, Dv) in `dtype`.
    A row whose keys are all hidden by a bool mask is zero.
    """
    batch, heads, q_len, dim = q.shape
    repeats = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    keys = k.to(dtype).repeat_interleave(repeats, dim=1).transpose(-1, -2)
    values = v.to(dtype).repeat_interleave(repeats, dim=1)
    out = torch.empty(batch, heads, q_len, v.shape[-1], dtype=dtype, device=q.device)
    step = max(1, _SCORES // max(1, batch * heads * k.shape[2]))
    for start in range(0, q_len, step):
        rows = slice(start, min(start + step, q_len))
        scores = q[:, :, rows].to(dtype) @ keys * scale
        if mask is not None:
            part = mask[:, :, rows] if mask.shape[2] != 1 else mask
            scores = scores.masked_fill(~part, float("-inf")) if mask.dtype is torch.bool else scores + part.to(dtype)
        weights = torch.softmax(scores, dim=-1)
        out[:, :, rows] = torch.nan_to_num(weights, nan=0.0) @ values if mask is not None else weights @ values
    return out
