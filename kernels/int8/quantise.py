"""K to int8 and V to 8 or 16 bits: two kernels, one that collects statistics and one that rounds.

One program of either has a chunk of tokens of one key head. The second adds up what the first has left per chunk, in a
fixed order, so that the same input always gives the same bits.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from .common import CHUNKS, E4M3_MAX, TINY, poison, relabel_keys, rotate, rotate_one, scale_places, to_e4m3, to_int8

# What is kept of a key head besides K8 and V8: rows with a number per channel, in float32. First these of each chunk …
K_SUM = tl.constexpr(0)  # Σ k / tokens
K_LARGEST = tl.constexpr(1)  # max |k|
V_SUM = tl.constexpr(2)  # Σ v/2 / tokens
V_HIGH = tl.constexpr(3)  # max v/2
V_LOW = tl.constexpr(4)  # min v/2
RESIDUAL = tl.constexpr(5)  # what rounding took from the mean of v/2, by this chunk
CHUNK_ROWS = tl.constexpr(6)
# … and after them these of the whole head.
V_MEAN = tl.constexpr(0)  # mean of v/2
V_SCALE = tl.constexpr(1)  # largest |v/2 - mean|, divided by the largest number V is stored as
K_BOUND = tl.constexpr(2)  # one number: no rotated key has a component beyond it
HEAD_ROWS = tl.constexpr(3)


@triton.jit(do_not_specialize=["kv_heads", "kv_len", "chunks"])
def collect_statistics(
    K, V, Numbers,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd,
    kv_heads, kv_len, dim, chunk, chunks,
    D: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Per channel of a chunk: sums, and the largest and smallest numbers. Grid: key heads of the batch · chunks.

    V is halved, here and until the output is written, so that no difference of two of its numbers is infinite.
    """
    program = tl.program_id(0)
    head = (program // chunks).to(tl.int64)
    first = (program % chunks) * chunk
    dims = tl.arange(0, D)
    K += head // kv_heads * k_sb + head % kv_heads * k_sh + dims[None, :].to(tl.int64) * k_sd
    V += head // kv_heads * v_sb + head % kv_heads * v_sh + dims[None, :].to(tl.int64) * v_sd
    share = 1.0 / kv_len
    k_sum = tl.zeros([D], tl.float32)
    k_largest = tl.zeros([D], tl.float32)
    v_sum = tl.zeros([D], tl.float32)
    v_high = tl.full([D], float("-inf"), tl.float32)
    v_low = tl.full([D], float("inf"), tl.float32)
    for start in range(first, tl.minimum(first + chunk, kv_len), BT):
        token = (start + tl.arange(0, BT)).to(tl.int64)[:, None]
        there = (token < kv_len) & (dims[None, :] < dim)
        k = tl.load(K + token * k_sn, mask=there, other=0.0).to(tl.float32)
        v = tl.load(V + token * v_sn, mask=there, other=0.0).to(tl.float32) * 0.5
        k_sum += tl.sum(k * share, 0)
        k_largest = tl.maximum(k_largest, tl.max(tl.abs(k), 0))
        v_sum += tl.sum(v * share, 0)
        v_high = tl.maximum(v_high, tl.max(tl.where(there, v, float("-inf")), 0))
        v_low = tl.minimum(v_low, tl.min(tl.where(there, v, float("inf")), 0))
    Numbers += head * (chunks * CHUNK_ROWS + HEAD_ROWS) * D + program % chunks * CHUNK_ROWS * D + dims
    tl.store(Numbers + K_SUM * D, k_sum)
    tl.store(Numbers + K_LARGEST * D, k_largest)
    tl.store(Numbers + V_SUM * D, v_sum)
    tl.store(Numbers + V_HIGH * D, v_high)
    tl.store(Numbers + V_LOW * D, v_low)


@triton.jit
def quantise_keys(
    K, Numbers, K8, KScale, k_sn, k_sd, first, kv_len, kv_pad, dim, chunk, chunks,
    D: tl.constexpr, BT: tl.constexpr, ROTATE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One chunk of keys, less their mean and rotated, to int8, each token with a scale. Pointers are the head's."""
    dims = tl.arange(0, D)
    part = tl.arange(0, CHUNKS)[:, None]
    of_part = Numbers + part * (CHUNK_ROWS * D) + dims[None, :]
    mean = tl.sum(tl.load(of_part + K_SUM * D, mask=part < chunks, other=0.0), 0)
    # Rotating divides by 128, so no sum of 64 numbers, and no difference of two such sums, is beyond the largest key.
    bound = tl.max(tl.max(tl.load(of_part + K_LARGEST * D, mask=part < chunks, other=0.0), 0), 0)
    if first == 0:
        tl.store(Numbers + (chunks * CHUNK_ROWS + K_BOUND) * D, bound)
    mean = rotate_one(mean, D) if ROTATE else mean * 0.5
    for start in range(first, tl.minimum(first + chunk, kv_pad), BT):
        tokens = start + tl.arange(0, BT)
        token = tokens.to(tl.int64)[:, None]
        there = (tokens < kv_len)[:, None]
        k = tl.load(K + token * k_sn + dims[None, :].to(tl.int64) * k_sd, mask=there & (dims < dim)[None, :], other=0.0)
        k = (rotate(k, BT, D, EMULATE) if ROTATE else k.to(tl.float32) * 0.5) - mean[None, :]
        k = tl.where(there, k, 0.0)
        largest = tl.max(tl.abs(k), 1)
        tl.store(K8 + token * D + dims[None, :], to_int8(k, largest[:, None]))
        tl.store(KScale + scale_places(tokens), largest / tl.maximum(bound, TINY) + poison(k, 1))


@triton.jit
def quantise_values(
    V, Numbers, V8, v_sn, v_sd, first, kv_len, kv_pad, dim, chunk, chunks,
    D: tl.constexpr, BT: tl.constexpr, FP8: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One chunk of values, less their mean, to e4m3 or fp16, each channel with a scale. Pointers are the head's."""
    dims = tl.arange(0, D)
    part = tl.arange(0, CHUNKS)[:, None]
    of_part = Numbers + part * (CHUNK_ROWS * D) + dims[None, :]
    mean = tl.sum(tl.load(of_part + V_SUM * D, mask=part < chunks, other=0.0), 0)
    high = tl.max(tl.load(of_part + V_HIGH * D, mask=part < chunks, other=float("-inf")), 0)
    low = tl.min(tl.load(of_part + V_LOW * D, mask=part < chunks, other=float("inf")), 0)
    largest = tl.maximum(tl.maximum(high - mean, mean - low), TINY)
    # fp16 is kept far from its ends: weights are at most 1 there, and products are added up in float32.
    top: tl.constexpr = E4M3_MAX if FP8 else 1.0
    if first == 0:
        of_head = Numbers + chunks * CHUNK_ROWS * D + dims
        tl.store(of_head + V_MEAN * D, mean)
        tl.store(of_head + V_SCALE * D, largest * (1.0 / top))
    residual = tl.zeros([D], tl.float32)
    for start in range(first, tl.minimum(first + chunk, kv_pad), BT):
        tokens = start + tl.arange(0, BT)
        token = tokens.to(tl.int64)[:, None]
        there = (tokens < kv_len)[:, None] & (dims < dim)[None, :]
        v = tl.load(V + token * v_sn + dims[None, :].to(tl.int64) * v_sd, mask=there, other=0.0)
        v = (v.to(tl.float32) * 0.5 - mean[None, :]) / largest[None, :] * top
        v = tl.where(there, v, 0.0)
        if FP8:
            rounded = to_e4m3(v, EMULATE)
            residual += tl.sum(v - rounded.to(tl.float32), 0)
            rounded = relabel_keys(tl.trans(rounded), D, BT)
            tl.store(V8 + dims.to(tl.int64)[:, None] * kv_pad + tokens[None, :], rounded)
        else:
            tl.store(V8 + token * D + dims[None, :], v.to(tl.float16))
    if FP8:
        row = first // chunk * CHUNK_ROWS + RESIDUAL
        tl.store(Numbers + row * D + dims, residual * (largest * (1.0 / top)) / kv_len)


@triton.jit(do_not_specialize=["kv_heads", "kv_len", "chunks"])
def quantise(
    K, V, Numbers, K8, KScale, V8,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd,
    kv_heads, kv_len, kv_pad, dim, chunk, chunks,
    D: tl.constexpr, BT: tl.constexpr, ROTATE: tl.constexpr, FP8: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """K8 (heads, kv_pad, D) in int8 with a scale per token; V8, what is left of V, and numbers per channel.

    V8 is (heads, D, kv_pad) in e4m3 with relabelled keys, or (heads, kv_pad, D) in fp16. Tokens beyond kv_len are 0.
    Grid: (key heads of the batch · chunks, K or V).
    """
    program = tl.program_id(0)
    head = (program // chunks).to(tl.int64)
    first = (program % chunks) * chunk
    Numbers += head * (chunks * CHUNK_ROWS + HEAD_ROWS) * D
    if tl.program_id(1) == 0:
        quantise_keys(
            K + head // kv_heads * k_sb + head % kv_heads * k_sh, Numbers, K8 + head * kv_pad * D,
            KScale + head * kv_pad, k_sn, k_sd, first, kv_len, kv_pad, dim, chunk, chunks, D, BT, ROTATE, EMULATE,
        )  # fmt: skip
    else:
        quantise_values(
            V + head // kv_heads * v_sb + head % kv_heads * v_sh, Numbers, V8 + head * kv_pad * D,
            v_sn, v_sd, first, kv_len, kv_pad, dim, chunk, chunks, D, BT, FP8, EMULATE,
        )  # fmt: skip
