"""Stand-in for FlashAttention 2: (B, N, H, D), no mask, an unknown keyword is a TypeError."""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import torch

_pretend = SimpleNamespace(**run_path(str(Path(__file__).resolve().parents[2] / "pretend.py")))
CALLS: list[dict] = []
flash_attn_gpu = None  # the compiled module in the real package; xformers looks for the name


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    CALLS.append({"softmax_scale": softmax_scale})
    _pretend.not_modelled(
        dropout_p=(dropout_p, 0.0),
        causal=(causal, False),
        window_size=(window_size, (-1, -1)),
        softcap=(softcap, 0.0),
        alibi_slopes=(alibi_slopes, None),
    )
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** (-0.5)
    head_size_og = q.size(3)
    if head_size_og % 8 != 0:
        pad = [0, 8 - head_size_og % 8]
        q, k, v = (torch.nn.functional.pad(t, pad) for t in (q, k, v))
    check = _pretend.check
    check(_pretend.capability((8, 0)) >= (8, 0), RuntimeError, "FlashAttention only supports Ampere GPUs or newer.")
    check(
        q.dtype in (torch.float16, torch.bfloat16),
        RuntimeError,
        "FlashAttention only support fp16 and bf16 data type",
    )
    check(k.dtype == q.dtype, RuntimeError, "query and key must have the same dtype")
    check(v.dtype == q.dtype, RuntimeError, "query and value must have the same dtype")
    batch, _, heads, head_size = q.shape
    kv_len, kv_heads = k.shape[1:3]
    check(head_size <= 256, RuntimeError, "FlashAttention forward only supports head dimension at most 256")
    check(heads % kv_heads == 0, RuntimeError, "Number of heads in key/value must divide number of heads in query")
    for name, tensor in (("k", k), ("v", v)):
        check(
            tuple(tensor.shape) == (batch, kv_len, kv_heads, head_size),
            RuntimeError,
            f"{name} must have shape (batch_size, seqlen_k, num_heads_k, head_size)",
        )
    out, lse = _pretend.attend(*_pretend.bhnd(q, k, v), softmax_scale)
    out = out.transpose(1, 2).contiguous()[..., :head_size_og]
    return out if not return_attn_probs else (out, lse, None)
