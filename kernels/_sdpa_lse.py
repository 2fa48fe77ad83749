"""PyTorch's back ends with the log-sum-exp of each row, which only the operators behind them give.

Signatures: aten/src/ATen/native/native_functions.yaml of PyTorch 2.11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import HALF, as_bias, capability, upright
from .split import run_lse as sliced_lse


def _lse_inputs(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor, float | None]:
    q, scale = upright(q, scale)
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    return q, k, v, scale


def _no_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError("on CUDA the log-sum-exp of a call with a mask is not to be had here")


def flash_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    q, k, v, scale = _lse_inputs(q, k, v, scale)
    if not q.is_cuda:
        bias = None if mask is None else as_bias(mask, q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
        return out, lse
    _no_mask(mask)
    dim = q.shape[3]
    if dim % 8:
        scale = dim**-0.5 if scale is None else scale
        q, k, v = (torch.nn.functional.pad(t, (0, -dim % 8)) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out[..., :dim], lse


def efficient_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    _no_mask(mask)
    q, k, v, scale = _lse_inputs(q, k, v, scale)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return out, lse[..., : q.shape[2]]  # it has room for multiples of 32 rows


def cudnn_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    _no_mask(mask)
    # Called by its operator it gives wrong numbers for tensors that are not contiguous (diffusers' attention_dispatch).
    q, k, v, scale = _lse_inputs(q, k, v, scale)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out, lse.reshape(q.shape[:3])  # from torch 2.9 on it has a fourth dimension, of one


def any_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The first back end that takes the call, else our own slices."""
    same, found = q.shape[3] == v.shape[3], capability(q)
    if q.device.type == "cpu" and same:
        return flash_lse(q, k, v, mask=mask, scale=scale)
    if found is not None and mask is None:
        if same and q.dtype in HALF and q.shape[3] <= 256 and found >= (8, 0):
            return flash_lse(q, k, v, scale=scale)
        if q.shape[3] % 8 == 0 and v.shape[3] % 8 == 0:
            return efficient_lse(q, k, v, scale=scale)
    return sliced_lse(q, k, v, mask=mask, scale=scale)
