"""The FlashAttention 3 operator: dispatched to first, on Ampere to Hopper, where the wheel holds it."""

import torch

from .common import AttentionFwOpBase, check_lastdim_alignment_stride1, gpu


class FwOp(AttentionFwOpBase):
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (8, 0)
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = (9, 0)
    SUPPORTED_DTYPES = frozenset({torch.half, torch.bfloat16})
    SUPPORTED_MAX_K = 256
    SUPPORTED_MIN_K = 32
    SUPPORTS_DIFFERENT_VALUE_EMBED = True
    NAME = "fa3F@0.0.0"

    @classmethod
    def not_supported_reasons(cls, d):
        reasons = super().not_supported_reasons(d)
        check_lastdim_alignment_stride1(reasons, "query", d.query, 8)
        check_lastdim_alignment_stride1(reasons, "key", d.value, 8)
        check_lastdim_alignment_stride1(reasons, "value", d.value, 8)
        if d.query.shape[-1] != d.value.shape[-1] and gpu() < (9, 0):
            reasons.append("Q/K head-dim must be equal to V head-dim for Ampere GPUs")
        return reasons
