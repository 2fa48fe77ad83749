"""Stand-in for `xformers.ops.fmha`: (B, N, H, D), grouped queries by five dimensions, biases neither broadcast nor odd.

Which operator a call is dispatched to, and the reasons against each, follow `dispatch.py` and `common.py` of 0.0.35.
"""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch

from . import cutlass, flash, flash3
from .common import Inputs

_pretend = SimpleNamespace(**run_path(str(Path(__file__).resolve().parents[4] / "pretend.py")))
CALLS: list[dict] = []
AttentionBias = Any
AttentionOp = Any

MemoryEfficientAttentionCutlassOp = (cutlass.FwOp, cutlass.BwOp)
MemoryEfficientAttentionFlashAttentionOp = (flash.FwOp, flash.BwOp)


def _dispatch(inp):
    reasons = {}
    for op in (flash3.FwOp, flash.FwOp, cutlass.FwOp):
        reasons[op.NAME] = op.not_supported_reasons(inp)
        if not reasons[op.NAME]:
            return op
    lines = "\n".join(f"`{name}` is not supported because:\n    " + "\n    ".join(r) for name, r in reasons.items())
    raise NotImplementedError(f"No operator found for `memory_efficient_attention_forward` with inputs:\n{lines}")


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Optional[Union[torch.Tensor, AttentionBias]] = None,  # noqa: UP007, UP045
    p: float = 0.0,
    scale: Optional[float] = None,  # noqa: UP045
    *,
    op: Optional[AttentionOp] = None,  # noqa: UP045
    output_dtype: Optional[torch.dtype] = None,  # noqa: UP045
) -> torch.Tensor:
    _pretend.not_modelled(p=(p, 0.0), output_dtype=(output_dtype, None))
    inp = Inputs(query, key, value, attn_bias, scale)
    inp.validate_inputs()
    if op is None:
        forward = _dispatch(inp)
    else:
        forward = op[0]
        reasons = forward.not_supported_reasons(inp)
        if reasons:
            lines = "\n    ".join(reasons)
            raise ValueError(
                f"Operator `memory_efficient_attention` does not support inputs:\n"
                f"`{forward.NAME}` is not supported because:\n    {lines}"
            )
    CALLS.append({"op": forward.NAME, "scale": scale, "ndim": query.ndim})
    if attn_bias is not None:
        # Checked by the operator itself, in C++.
        _pretend.check(
            attn_bias.dtype == query.dtype, RuntimeError, "invalid dtype for bias - should match query's dtype"
        )
    shape = query.shape[:-1] + value.shape[-1:]
    if query.ndim == 5:
        # (B, N, G, H, D): each of the G·H heads has its own, already repeated, key and value.
        query, key, value = (t.flatten(2, 3) for t in (query, key, value))
        attn_bias = None if attn_bias is None else attn_bias.flatten(1, 2)
    out, _ = _pretend.attend(*_pretend.bhnd(query, key, value), scale, attn_bias, scale_first=forward is cutlass.FwOp)
    return out.transpose(1, 2).reshape(shape)
