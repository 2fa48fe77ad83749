"""The pack's own kernels, in Triton: nothing to compile, no wheel to match. docs/int8.md derives them.

`attune_int8`: 8-bit scores, values in 8 bits where the GPU multiplies e4m3, else in 16. Triton is imported when the
kernel is loaded, and compiles it for the GPU at its first calls.
"""

from __future__ import annotations

from ...attention.call import AttentionCall, Layout
from ...attention.kernel import Kernel, Needs, Run
from .._common import ANY_MASK, FULL, chosen, needs_version, on_device
from .tiles import chunk_plan, width_of

_URL = "https://github.com/triton-lang/triton"
# Host-side tensor descriptors and clamps that hand NaN on; compiled and run (in its interpreter) with 3.6 only.
_TRITON = needs_version("triton", at_least="3.4", why="it lacks what the kernel is written with")


def _load_int8() -> Run:
    from .launch import int8_attention

    return on_device(int8_attention)


def _workspace_int8(call: AttentionCall) -> int:
    plan, width = chunk_plan(call.kv_len), width_of(call.head_dim)
    heads = call.batch * call.kv_heads
    # K in 8 bits and a scale per token; V in 16 bits at most; statistics, kept numbers and residuals per channel.
    return heads * (plan.padded * (width + 4 + 2 * width) + 4 * width * (6 * plan.chunks + 3))


KERNELS = (
    Kernel(
        name="attune_int8",
        title="Attune int8 (Triton)",
        package="",
        layout=Layout.BNHD,
        precision="lossy",
        # Twice what the same arithmetic in PyTorch gives on the inputs of make_inputs (tests/test_int8_accuracy.py).
        tolerance=dict.fromkeys(FULL, 0.08),
        load=_load_int8,
        needs=Needs(
            sm=(((8, 0), (999, 9)),),
            dtypes=FULL,
            head_dims=range(1, 257),
            masks=ANY_MASK,
            gqa=True,
            triton=True,
            machine_rules=chosen(_TRITON),
        ),
        url=_URL,
        workspace_bytes=_workspace_int8,
    ),
)
