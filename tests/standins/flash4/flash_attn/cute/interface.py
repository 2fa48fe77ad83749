"""Stand-in for FlashAttention 4 (flash-attn-4 4.0.0b36): (B, N, H, D), no mask tensor, always returns a tuple."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import torch

_pretend = SimpleNamespace(**run_path(str(Path(__file__).resolve().parents[3] / "pretend.py")))
CALLS: list[dict] = []


def _validate_head_dims(head_dim, head_dim_v, compute_capability, alignment):
    divides = head_dim % alignment == 0 and head_dim_v % alignment == 0
    if compute_capability == 9:
        assert 8 <= head_dim <= 256 and 8 <= head_dim_v <= 256 and divides, (
            f"(head_dim, head_dim_v)=({head_dim}, {head_dim_v}) is not supported on SM90. "
            f"head_dim and head_dim_v must be between 8 and 256 and divisible by {alignment}."
        )
    elif compute_capability in [10, 11]:
        standard = 8 <= head_dim <= 128 and 8 <= head_dim_v <= 128
        assert (standard or (head_dim, head_dim_v) in ((192, 128), (256, 256))) and divides, (
            f"(head_dim, head_dim_v)=({head_dim}, {head_dim_v}) is not supported on SM100/SM110. "
            f"head_dim and head_dim_v must be between 8 and 128 and divisible by {alignment}, "
            "or (192, 128) for DeepSeek, or (256, 256) for hd256."
        )
    else:  # not checked by the real function; its kernels were written for at most 128 there
        assert head_dim <= 128 and divides, f"can_implement({head_dim}, {head_dim_v}) is False"


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: list | None = None,
    aux_scalars: tuple | None = None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
):
    CALLS.append({"softmax_scale": softmax_scale})
    _pretend.not_modelled(
        qv=(qv, None),
        gather_kv_indices=(gather_kv_indices, None),
        causal=(causal, False),
        window_size=(window_size, (None, None)),
        learnable_sink=(learnable_sink, None),
        softcap=(softcap, 0.0),
        score_mod=(score_mod, None),
        mask_mod=(mask_mod, None),
        block_sparse_tensors=(block_sparse_tensors, None),
    )
    batch, _, heads, head_dim = q.shape
    kv_len, kv_heads, head_dim_v = k.shape[1], k.shape[2], v.shape[-1]
    assert k.shape == (batch, kv_len, kv_heads, head_dim)
    assert v.shape == (batch, kv_len, kv_heads, head_dim_v)
    assert v.dtype in [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], (
        "inputs must be float16, bfloat16, fp8 e4m3fn, or fp8 e5m2"
    )
    assert q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype"
    major, _ = _pretend.capability((9, 0))
    assert major in [8, 9, 10, 11, 12], "Unsupported compute capability. Supported: 8.x, 9.x, 10.x, 11.x, 12.x"
    assert heads % kv_heads == 0, "num_head must be divisible by num_head_kv"
    _validate_head_dims(head_dim, head_dim_v, major, 16 // v.element_size())
    out, lse = _pretend.attend(*_pretend.bhnd(q, k, v), softmax_scale)
    return out.transpose(1, 2).contiguous(), lse if return_lse else None
