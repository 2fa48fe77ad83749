"""The pack's own kernels, in Triton: nothing to compile, no wheel to match. docs/int8.md derives them.

`attune_int8`: 8-bit scores, values in 8 bits where the GPU multiplies e4m3, else in 16. `attune_bf16`: the same loop on
16-bit tensors as they are. Triton is imported when a kernel is loaded, and compiles it for the GPU at its first calls.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from ...attention.call import AttentionCall, Layout
from ...attention.kernel import Kernel, Needs, Run, Tuning
from .._common import ANY_MASK, EXACT, FULL, HALF, chosen, needs_version
from . import tuning
from .tiles import WIDTHS, chunk_plan, width_of

_URL = "https://github.com/triton-lang/triton"
# Host-side tensor descriptors and clamps that hand NaN on; compiled and run (in its interpreter) with 3.6 only.
_TRITON = needs_version("triton", at_least="3.4", why="it lacks what the kernel is written with")


def _load_int8() -> Run:
    from .graph import runner

    return runner("int8_attention")


def _load_bf16() -> Run:
    from .graph import runner

    return runner("exact_attention")


def _workspace_int8(call: AttentionCall) -> int:
    plan, width = chunk_plan(call.kv_len), width_of(call.head_dim)
    heads = call.batch * call.kv_heads
    # K in 8 bits and a scale per token; V in 16 bits at most; statistics, kept numbers and residuals per channel.
    return heads * (plan.padded * (width + 4 + 2 * width) + 4 * width * (6 * plan.chunks + 3))


def _origin() -> str:
    """A digest of this folder's code: with every change the kernels are proved, measured and refined anew."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:32]


def _tuning(name: str, allowed: float) -> Tuning:
    return Tuning(lambda device, say: tuning.refine(name, device, allowed, say), functools.partial(tuning.use, name))


def _needs(dtypes: frozenset[torch.dtype]) -> Needs:
    # Triton 3.6 does not compile 8-bit products for sm_75.
    return Needs(
        sm=(((8, 0), (999, 9)),),
        dtypes=dtypes,
        head_dims=range(1, WIDTHS[-1] + 1),
        masks=ANY_MASK,
        gqa=True,
        triton=True,
        machine_rules=chosen(_TRITON),
    )


_ORIGIN = _origin()
KERNELS = (
    Kernel(
        name="attune_int8",
        title="Attune int8 (Triton)",
        package="",
        layout=Layout.BNHD,
        precision="lossy",
        # Twice what the same arithmetic in PyTorch gives on the inputs of make_inputs: docs/int8.md.
        tolerance=dict.fromkeys(FULL, 0.08),
        load=_load_int8,
        needs=_needs(FULL),
        url=_URL,
        origin=_ORIGIN,
        tuning=_tuning("attune_int8", 0.08),
        workspace_bytes=_workspace_int8,
    ),
    Kernel(
        name="attune_bf16",
        title="Attune bf16 (Triton)",
        package="",
        layout=Layout.BNHD,
        precision="exact",
        tolerance={dtype: EXACT[dtype] for dtype in HALF},
        load=_load_bf16,
        needs=_needs(HALF),
        url=_URL,
        origin=_ORIGIN,
        tuning=_tuning("attune_bf16", EXACT[torch.bfloat16]),
    ),
)
