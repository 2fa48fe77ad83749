"""Stand-in for SageAttention 2.2.0 as first released: no function takes a mask, all swallow unknown keywords.

Builds from later commits call themselves 2.2.0 as well and give `sageattn_qk_int8_pv_fp16_triton` an `attn_mask`.
"""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any, Optional

import torch

_pretend = SimpleNamespace(**run_path(str(Path(__file__).resolve().parents[2] / "pretend.py")))
CALLS: list[dict] = []


def _attend(name, q, k, v, tensor_layout, is_causal, sm_scale, return_lse, scale_first, v_dtype=None, **recorded):
    CALLS.append({"name": name, "tensor_layout": tensor_layout, "sm_scale": sm_scale, **recorded})
    _pretend.not_modelled(is_causal=(is_causal, False))
    assert q.dtype in [torch.float16, torch.bfloat16], (
        "Input tensors must be in dtype of torch.float16 or torch.bfloat16"
    )
    assert q.device == k.device == v.device, "All tensors must be on the same device."
    assert q.dtype == k.dtype == v.dtype, "All tensors must have the same dtype."
    gran = recorded.get("qk_quant_gran", "per_warp")
    assert gran in ["per_warp", "per_thread"], "qk_quant_gran must be either 'per_warp' or 'per_thread'."
    head_dim_og = q.size(-1)
    if head_dim_og > 128:
        raise ValueError(f"Unsupported head_dim: {head_dim_og}")
    if head_dim_og not in (64, 128):
        pad = (0, (64 if head_dim_og < 64 else 128) - head_dim_og)
        q, k, v = (torch.nn.functional.pad(t, pad) for t in (q, k, v))
    assert q.stride(-1) == 1 and k.stride(-1) == 1 and v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    if tensor_layout not in ("HND", "NHD"):
        raise ValueError(f"Unknown tensor layout: {tensor_layout}")
    # The real kernels check this in C++ or read V out of bounds.
    _pretend.check(v.shape == k.shape, RuntimeError, "value must have the shape of key")
    scale = head_dim_og**-0.5 if sm_scale is None else sm_scale
    if v_dtype is not None:
        v = v.to(v_dtype)
    if tensor_layout == "NHD":
        q, k, v = _pretend.bhnd(q, k, v)
    out, lse = _pretend.attend(q, k, v, scale, scale_first=scale_first)
    if tensor_layout == "NHD":
        out = out.transpose(1, 2).contiguous()
    out = out[..., :head_dim_og]
    return (out, lse) if return_lse else out  # (B, H, N) in either layout


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: Optional[float] = None,  # noqa: UP045
    return_lse: bool = False,
    **kwargs: Any,
):
    major, minor = _pretend.capability((8, 9))
    rest = {"tensor_layout": tensor_layout, "is_causal": is_causal, "sm_scale": sm_scale, "return_lse": return_lse}
    match f"sm{major}{minor}":
        case "sm80":
            return sageattn_qk_int8_pv_fp16_cuda(q, k, v, pv_accum_dtype="fp32", **rest)
        case "sm86":
            return sageattn_qk_int8_pv_fp16_triton(q, k, v, **rest)
        case "sm89":
            return sageattn_qk_int8_pv_fp8_cuda(q, k, v, pv_accum_dtype="fp32+fp16", **rest)
        case "sm90":
            return sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, pv_accum_dtype="fp32+fp32", **rest)
        case "sm120":
            return sageattn_qk_int8_pv_fp8_cuda(q, k, v, qk_quant_gran="per_warp", pv_accum_dtype="fp32+fp16", **rest)
        case arch:
            raise ValueError(f"Unsupported CUDA architecture: {arch}")


def sageattn_qk_int8_pv_fp16_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    sm_scale: Optional[float] = None,  # noqa: UP045
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    if quantization_backend not in ("triton", "cuda"):
        raise ValueError(f"Unsupported quantization backend: {quantization_backend}")
    # The scale goes into Q before it is quantised, so its sign does not matter here.
    return _attend(
        "fp16_triton", q, k, v, tensor_layout, is_causal, sm_scale, return_lse, True, torch.float16, **kwargs
    )


def sageattn_qk_int8_pv_fp16_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: Optional[float] = None,  # noqa: UP045
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    if pv_accum_dtype not in ("fp32", "fp16", "fp16+fp32"):
        raise ValueError(f"Unsupported pv_accum_dtype: {pv_accum_dtype}")
    return _attend(
        "fp16_cuda",
        *(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, False, torch.float16),
        qk_quant_gran=qk_quant_gran,
        pv_accum_dtype=pv_accum_dtype,
    )


def _garbage(out):
    """An accumulator name that the real function does not know runs no kernel: uninitialised memory comes back."""
    return torch.full_like(out, float("nan"))


def sageattn_qk_int8_pv_fp8_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: Optional[float] = None,  # noqa: UP045
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    out = _attend(
        "fp8_cuda",
        *(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, False),
        qk_quant_gran=qk_quant_gran,
        pv_accum_dtype=pv_accum_dtype,
    )
    return out if pv_accum_dtype in ("fp32", "fp32+fp32", "fp32+fp16") else _garbage(out)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: Optional[float] = None,  # noqa: UP045
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    assert _pretend.capability((9, 0)) == (9, 0), (
        "SM90 kernel is not available. Make sure you GPUs with compute capability 9.0."
    )
    out = _attend(
        "fp8_cuda_sm90",
        *(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, False),
        qk_quant_gran=qk_quant_gran,
        pv_accum_dtype=pv_accum_dtype,
    )
    if pv_accum_dtype == "fp32":
        raise NotImplementedError("Please use pv_accum_dtype='fp32+fp32' for sm90.")
    return out if pv_accum_dtype == "fp32+fp32" else _garbage(out)
