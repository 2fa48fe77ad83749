"""A kernel around the pack's rounding to e4m3. Only for support/interpreter.py, as it imports Triton."""

import triton
import triton.language as tl

from comfyui_attune.kernels.int8.common import to_e4m3


@triton.jit
def round_all(X, Out, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(Out + place, to_e4m3(tl.load(X + place), True))
