"""The two kernels that exist only inside ComfyUI: its sub-quadratic and its basic attention."""

from __future__ import annotations

from types import ModuleType

import torch

from ..attention.call import AttentionCall, Layout
from ..attention.kernel import Kernel, Needs, Run
from .trampoline import plain, wrapped_cells

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _host_run(module: ModuleType, name: str) -> Run:
    func = plain(wrapped_cells(module)[name].cell_contents)

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        _, heads, q_len, _ = q.shape
        if mask is not None:
            # Half of the lowest number instead of -inf: a chunk of keys that is hidden as a whole would give NaN.
            hidden = torch.finfo(q.dtype).min / 2
            if mask.dtype is torch.bool:
                # These functions add a bool mask as 0 and 1: a wrong result without an error.
                mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, hidden)
            else:
                mask = mask.clamp(min=hidden).to(q.dtype)
            mask = mask.expand(mask.shape[0], mask.shape[1], q_len, k.shape[2])
        # They cannot take `scale=None`: the keyword is left out.
        extra = {} if scale is None else {"scale": scale}
        if k.shape[1] != heads:
            extra["enable_gqa"] = True
        return func(q, k, v, heads, mask, skip_reshape=True, skip_output_reshape=True, **extra)

    return run


def _sub_quad_bytes(call: AttentionCall) -> int:
    # Chunks of at most 4096 queries by all keys, three times (scores, weights, a copy); the host shrinks them further.
    chunk = 3 * 4 * call.batch * call.heads * 512 * call.kv_len
    # A mask is written out for every head, query and key.
    return min(3 * call.score_bytes, chunk) + (call.score_bytes if call.mask else 0)


def host_kernels(module: ModuleType) -> list[Kernel]:
    """`sub_quad` and `basic`, built around the functions of `comfy.ldm.modules.attention` (`module`)."""
    return [
        Kernel(
            name="sub_quad",
            title="ComfyUI sub-quadratic attention",
            package="",
            layout=Layout.BHND,
            precision="exact",
            tolerance=_TOLERANCE,
            load=lambda: _host_run(module, "attention_sub_quad"),
            needs_proof=False,
            needs=Needs(
                devices=_DEVICES, dtypes=_DTYPES, masks=frozenset({"bool", "float"}), gqa=True, fp32_scores=False
            ),
            workspace_bytes=_sub_quad_bytes,
        ),
        Kernel(
            name="basic",
            title="ComfyUI basic attention (materialises the scores)",
            package="",
            layout=Layout.BHND,
            precision="exact",
            tolerance=_TOLERANCE,
            load=lambda: _host_run(module, "attention_basic"),
            needs_proof=False,
            needs=Needs(
                devices=_DEVICES, dtypes=_DTYPES, masks=frozenset({"bool", "float"}), gqa=True, fp32_scores=False
            ),
            workspace_bytes=lambda call: 2 * call.score_bytes,
        ),
    ]
