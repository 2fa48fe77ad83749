"""Inputs, and what every operator of xformers checks."""

from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import torch

_pretend = SimpleNamespace(**run_path(str(Path(__file__).resolve().parents[4] / "pretend.py")))


def gpu():
    return _pretend.capability((8, 9))


@dataclass
class Inputs:
    """What `memory_efficient_attention` was given."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_bias: Any = None
    scale: float | None = None

    def validate_inputs(self):
        q, k, v = self.query, self.key, self.value
        shapes = f"\n  query.shape: {q.shape}\n  key.shape  : {k.shape}\n  value.shape: {v.shape}"
        if q.ndim not in (4, 5) or k.ndim != q.ndim or v.ndim != q.ndim:  # BMK exists too, but is not modelled
            raise ValueError(f"Query/Key/Value should all have BMGHK, BMHK or BMK shape.{shapes}")
        if not (q.device == k.device == v.device):
            raise ValueError("Query/Key/Value should all be on the same device")
        if not (q.dtype == k.dtype == v.dtype):
            raise ValueError(
                "Query/Key/Value should either all have the same dtype, or "
                "(in the quantized case) Key/Value should have dtype torch.int32\n"
                f"  query.dtype: {q.dtype}\n  key.dtype  : {k.dtype}\n  value.dtype: {v.dtype}"
            )
        if q.ndim == 4 and isinstance(self.attn_bias, torch.Tensor):
            expected = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            if self.attn_bias.shape != expected:
                raise ValueError(
                    f"Invalid shape for attention bias: {self.attn_bias.shape} (expected {expected}){shapes}"
                )
        heads = tuple(q.shape[2:-1])
        if k.shape != (q.shape[0], k.shape[1], *heads, q.shape[-1]) or v.shape != (
            q.shape[0],
            k.shape[1],
            *heads,
            v.shape[-1],
        ):
            raise ValueError(
                f"Incompatible shapes for attention inputs:{shapes}\n"
                "HINT: We don't support broadcasting, please use `expand` "
                "yourself before calling `memory_efficient_attention` if you need to"
            )


def check_lastdim_alignment_stride1(reasons, name, x, alignment):
    if x.shape[-1] % alignment != 0:
        reasons.append(f"{name}.shape[-1] % {alignment} != 0")
    elif x.stride(-2) % alignment != 0:
        reasons.append(f"{name}.stride(-2) % {alignment} != 0 ({name}.stride() = {x.stride()})")
    if x.stride(-1) > 1:
        reasons.append(
            f"{name}.stride(-1) > 1 ({name}.stride() = {x.stride()}) - you should call `.contiguous()` on the input"
        )


def check_strides_for_bmghk(x, name, reasons):
    if x.ndim == 5:
        stride_g, stride_h = x.stride(2), x.stride(3)
        if x.shape[2] == 1 or x.shape[3] == 1 or stride_h == 0:
            return
        if stride_g != stride_h * x.shape[-2]:
            reasons.append("GQA is only supported when the G/H dimensions are contiguous")


class AttentionFwOpBase:
    """An operator's limits, and the reasons they give."""

    CUDA_MINIMUM_COMPUTE_CAPABILITY = (5, 0)
    CUDA_MAXIMUM_COMPUTE_CAPABILITY: tuple[int, int] | None = None
    SUPPORTED_DTYPES: frozenset = frozenset()
    SUPPORTED_MAX_K = 0
    SUPPORTED_MIN_K = 0
    SUPPORTED_ATTN_BIAS_TYPES: tuple = (type(None),)
    SUPPORTS_DIFFERENT_VALUE_EMBED = False
    NAME = ""

    @classmethod
    def is_available(cls):
        return True

    @classmethod
    def not_supported_reasons(cls, d):
        reasons = []
        k_dim, v_dim = d.query.shape[-1], d.value.shape[-1]
        if not cls.SUPPORTS_DIFFERENT_VALUE_EMBED and k_dim != v_dim:
            reasons.append("query.shape[-1] != value.shape[-1]")
        if max(k_dim, v_dim) > cls.SUPPORTED_MAX_K:
            reasons.append(f"max(query.shape[-1], value.shape[-1]) > {cls.SUPPORTED_MAX_K}")
        if min(k_dim, v_dim) < cls.SUPPORTED_MIN_K:
            reasons.append(f"min(query.shape[-1], value.shape[-1]) < {cls.SUPPORTED_MIN_K}")
        low, high = cls.CUDA_MINIMUM_COMPUTE_CAPABILITY, cls.CUDA_MAXIMUM_COMPUTE_CAPABILITY
        if gpu() < low:
            reasons.append(f"requires device with capability >= {low} but your GPU has capability {gpu()} (too old)")
        elif high is not None and gpu() > high:
            reasons.append(f"requires device with capability <= {high} but your GPU has capability {gpu()} (too new)")
        if d.query.dtype not in cls.SUPPORTED_DTYPES:
            reasons.append(f"dtype={d.query.dtype} (supported: {cls.SUPPORTED_DTYPES})")
        if type(d.attn_bias) not in cls.SUPPORTED_ATTN_BIAS_TYPES:
            reasons.append(f"attn_bias type is {type(d.attn_bias)}")
        if d.query.dtype is torch.bfloat16 and gpu()[0] < 8:
            reasons.append("bf16 is only supported on A100+ GPUs")
        if not cls.is_available():
            reasons.append("operator wasn't built - see `python -m xformers.info` for more info")
        return reasons
