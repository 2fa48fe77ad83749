"""Stand-in for an early FlashAttention 3 (as in the sources of flash-attn 2.7.4): returns (out, log-sum-exp)."""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import torch

_pretend = SimpleNamespace(**run_path(str(Path(__file__).resolve().parents[1] / "pretend.py")))
CALLS: list[dict] = []


def _attend(q, k, v, softmax_scale):
    CALLS.append({"softmax_scale": softmax_scale})
    check = _pretend.check
    major, minor = _pretend.capability((9, 0))
    check(major >= 8, RuntimeError, "FlashAttention only supports Ampere GPUs or newer.")
    # Real builds hold Hopper's kernels; elsewhere the launch fails, and its check ends the process.
    check((major, minor) == (9, 0), RuntimeError, "no kernel image is available for execution on the device")
    check(
        q.dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        RuntimeError,
        "FlashAttention only supports fp16, bf16, and fp8_e4m3 data type",
    )
    check(k.dtype == q.dtype, RuntimeError, "query and key must have the same dtype")
    check(v.dtype == q.dtype, RuntimeError, "query and value must have the same dtype")
    batch, _, heads, head_size = q.shape
    kv_len, kv_heads = k.shape[1:3]
    check(head_size <= 256, RuntimeError, "FlashAttention forward only supports head dimension at most 256")
    check(heads % kv_heads == 0, RuntimeError, "Number of heads in key/value must divide number of heads in query")
    check(head_size % 8 == 0, RuntimeError, "head_size should be a multiple of 8")
    for name, tensor in (("k", k), ("v", v)):
        check(
            tuple(tensor.shape) == (batch, kv_len, kv_heads, head_size),
            RuntimeError,
            f"{name} must have shape (batch_size, seqlen_k, num_heads_k, head_size)",
        )
    out, lse = _pretend.attend(*_pretend.bhnd(q, k, v), softmax_scale)
    return out.transpose(1, 2).contiguous(), lse


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    sink_token_length=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    _pretend.not_modelled(
        causal=(causal, False),
        q_descale=(q_descale, None),
        window_size=(window_size, (-1, -1)),
        sink_token_length=(sink_token_length, 0),
        softcap=(softcap, 0.0),
    )
    return _attend(q, k, v, softmax_scale)
