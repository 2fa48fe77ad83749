"""The CUTLASS operator: biases, any head dimension, not newer than Hopper since 0.0.33."""

import torch

from .common import AttentionFwOpBase, check_lastdim_alignment_stride1, gpu


def _minimum_gemm_alignment(inp):
    sm = gpu()[0] * 10 + gpu()[1]
    bits_per_scalar = {torch.float: 32, torch.half: 16, torch.bfloat16: 16}[inp.query.dtype]
    alignment = 4 if sm >= 80 else 1
    if sm >= 80 or (sm >= 70 and bits_per_scalar == 16):
        alignment = max(alignment, 128 // bits_per_scalar)
    return alignment


def _check_bias_alignment(reasons, attn_bias):
    if attn_bias is None:
        return
    alignment = 128 // torch.finfo(attn_bias.dtype).bits
    for d in range(attn_bias.ndim - 1):
        if attn_bias.stride(d) % alignment != 0:
            reasons.append(f"attn_bias.stride(-2) % {alignment} != 0 (attn_bias.stride() = {attn_bias.stride()})")
    if attn_bias.stride(-1) > 1:
        reasons.append(
            f"attn_bias.stride(-1) > 1 (attn_bias.stride() = {attn_bias.stride()}) - "
            "you should call `.contiguous()` on the bias"
        )


class FwOp(AttentionFwOpBase):
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = (9, 0)
    SUPPORTED_DTYPES = frozenset({torch.float, torch.half, torch.bfloat16})
    SUPPORTED_MAX_K = 65536
    SUPPORTED_ATTN_BIAS_TYPES = (type(None), torch.Tensor)
    SUPPORTS_DIFFERENT_VALUE_EMBED = True
    NAME = "cutlassF-pt"

    @classmethod
    def not_supported_reasons(cls, d):
        reasons = super().not_supported_reasons(d)
        if d.query.dtype in cls.SUPPORTED_DTYPES:
            alignment = _minimum_gemm_alignment(d)
            check_lastdim_alignment_stride1(reasons, "query", d.query, alignment)
            check_lastdim_alignment_stride1(reasons, "value", d.value, alignment)
        _check_bias_alignment(reasons, d.attn_bias)
        return reasons


class BwOp:
    """There for its name; the stand-in has no backward pass."""
