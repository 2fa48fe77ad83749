"""Stand-in for early builds of SageAttention 3: the same function, only found in `sageattn3.api`."""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

_pretend = SimpleNamespace(**run_path(str(Path(__file__).resolve().parents[2] / "pretend.py")))
CALLS: list[dict] = []


def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    CALLS.append({"per_block_mean": per_block_mean, **kwargs})
    _pretend.not_modelled(is_causal=(is_causal, False))
    if q.size(-1) >= 256:
        print(f"Unsupported Headdim {q.size(-1)}")
        return sdpa(q, k, v, is_causal=is_causal)
    k -= k.mean(dim=-2, keepdim=True)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"scaled_fp4_quant failed to dispatch data type {q.dtype}")
    if q.size(-1) not in (64, 128):
        raise ValueError(f"Unsupported head dim: {q.size(-1)}")
    major, minor = _pretend.capability((12, 0))
    _pretend.check((major, minor) in ((12, 0), (12, 1)), RuntimeError, "only supports Blackwell GPUs or newer.")
    _pretend.check(k.dtype == q.dtype, RuntimeError, "query and key must have the same dtype")
    _pretend.check(v.dtype == q.dtype, RuntimeError, "query and value must have the same dtype")
    _pretend.check(q.size(1) == k.size(1) == v.size(1), RuntimeError, "We do not support MQA/GQA yet")
    _pretend.check(v.shape == k.shape, RuntimeError, "v must have shape (batch, heads, head_size, seqlen_k/2)")
    out, _ = _pretend.attend(q.contiguous(), k.contiguous(), v.contiguous())
    return out
