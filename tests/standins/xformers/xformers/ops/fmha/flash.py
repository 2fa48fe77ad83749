"""The FlashAttention 2 operator: sixteen bits, no bias, Ampere or newer."""

import torch

from .common import AttentionFwOpBase, check_lastdim_alignment_stride1, check_strides_for_bmghk


class FwOp(AttentionFwOpBase):
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (8, 0)
    SUPPORTED_DTYPES = frozenset({torch.half, torch.bfloat16})
    SUPPORTED_MAX_K = 256
    NAME = "fa2F@2.8.3"

    @classmethod
    def not_supported_reasons(cls, d):
        reasons = super().not_supported_reasons(d)
        check_lastdim_alignment_stride1(reasons, "query", d.query, 8)
        for name, tensor in (("query", d.query), ("key", d.key), ("value", d.value)):
            check_strides_for_bmghk(tensor, name, reasons)
        return reasons


class BwOp:
    """There for its name; the stand-in has no backward pass."""
