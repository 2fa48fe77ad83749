"""Stand-in for comfy-kitchen's int8 attention: (B, H, N, D), masks that broadcast, last dimension contiguous."""

import math
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import torch

_pretend = SimpleNamespace(**run_path(str(Path(__file__).resolve().parents[2] / "pretend.py")))
CALLS: list[dict] = []
_SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class PrequantizedInt8Attention:
    """Holds what `int8_attention_from_prequantized` needs; here simply copies."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attention_scale: float
    attn_mask: torch.Tensor | None


def is_available(device: torch.device | None = None) -> bool:
    return _pretend.capability((8, 9)) >= (7, 5)


def _validate_inputs(q, k, v, attn_mask):
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError("q, k, and v must have shape [batch, heads, sequence, head_dim]")
    if q.dtype not in _SUPPORTED_DTYPES:
        raise TypeError(f"q, k, and v must be float32, float16, or bfloat16, got {q.dtype}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k, and v must have the same dtype, got {q.dtype}, {k.dtype}, and {v.dtype}")
    if q.device != k.device or q.device != v.device:
        raise ValueError("q, k, and v must be on the same CUDA device")
    if not is_available(q.device):
        raise RuntimeError(
            "INT8 attention requires the comfy-kitchen CUDA extension on SM75 or newer, "
            "or the HIP extension on an AMD device with matrix cores (RDNA3 or newer)"
        )
    batch, q_heads, q_length, head_dim = q.shape
    k_batch, kv_heads, kv_length, k_head_dim = k.shape
    if v.shape != (batch, kv_heads, kv_length, head_dim):
        raise ValueError(f"v must have shape [q.batch, k.heads, k.sequence, q.head_dim], got {tuple(v.shape)}")
    if k_batch != batch or k_head_dim != head_dim:
        raise ValueError(f"q and k batch/head dimensions must match, got {tuple(q.shape)} and {tuple(k.shape)}")
    if 0 in (batch, q_heads, kv_heads, q_length, kv_length):
        raise ValueError("batch, head counts, and sequence lengths must be positive")
    if q_heads % kv_heads != 0:
        raise ValueError(f"q head count ({q_heads}) must be divisible by k/v head count ({kv_heads})")
    if head_dim <= 0 or head_dim > 256:
        raise ValueError(f"head_dim must be in [1, 256], got {head_dim}")
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("the last dimension of q, k, and v must be contiguous")
    if attn_mask is None:
        return None
    if attn_mask.device != q.device:
        raise ValueError("attn_mask must be on the same CUDA device as q, k, and v")
    if attn_mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
        raise TypeError("attn_mask must be bool, float16, bfloat16, or float32")
    try:
        return torch.broadcast_to(attn_mask, (batch, q_heads, q_length, kv_length))
    except RuntimeError as error:
        raise ValueError(
            "attn_mask must be broadcastable to "
            f"[{batch}, {q_heads}, {q_length}, {kv_length}], got {tuple(attn_mask.shape)}"
        ) from error


def prequantize_int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
) -> PrequantizedInt8Attention:
    attn_mask = _validate_inputs(q, k, v, attn_mask)
    attention_scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(attention_scale):
        raise ValueError(f"scale must be finite, got {attention_scale}")
    return PrequantizedInt8Attention(q.clone(), k.clone(), v.clone(), attention_scale, attn_mask)


def int8_attention_from_prequantized(
    quantized: PrequantizedInt8Attention,
) -> torch.Tensor:
    if not isinstance(quantized, PrequantizedInt8Attention):
        raise TypeError(f"quantized must be returned by prequantize_int8_attention, got {type(quantized).__name__}")
    bias = quantized.attn_mask
    if bias is not None and bias.dtype is torch.bool:
        bias = torch.zeros(bias.shape).masked_fill(~bias, float("-inf"))
    out, _ = _pretend.attend(quantized.q, quantized.k, quantized.v, quantized.attention_scale, bias, scale_first=True)
    return out


def int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    CALLS.append({"scale": scale, "masked": attn_mask is not None})
    return int8_attention_from_prequantized(prequantize_int8_attention(q, k, v, scale=scale, attn_mask=attn_mask))
