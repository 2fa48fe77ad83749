"""What the kernels of this package share, as Triton functions: rotation, rounding, masks, one step of the softmax.

Letters: BM queries and BN keys in a tile, D the head dimension padded to a power of two. docs/int8.md derives it all.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from . import tiles

LOG2E = tl.constexpr(1.4426950408889634)
E4M3_MAX = tl.constexpr(448.0)
# The sum of this and a float32 below 2**22 is that number rounded to an integer, halves to even.
ROUNDING = tl.constexpr(12582912.0)
TINY = tl.constexpr(1e-37)
CHUNKS = tl.constexpr(tiles.CHUNKS)
BLOCK = tl.constexpr(64)  # channels that are rotated together


@triton.jit
def signed_hadamard(dtype: tl.constexpr):
    """(64, 64): a Hadamard matrix with a sign per row, divided by 128.

    That is a power of two, so exact, and small enough for sums of the largest numbers, and for differences of two such
    sums, to stay finite.
    """
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    bits = row & column
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    # Any fixed pattern of signs will do; this one is the golden ratio's, as in Fibonacci hashing.
    sign = (row * 40503) >> 15
    return tl.where(((bits ^ sign) & 1) == 1, -0.5 / BLOCK, 0.5 / BLOCK).to(dtype)


@triton.jit
def dot(x, y, acc, EMULATE: tl.constexpr):
    """x · y + acc in float32. The interpreter (EMULATE; Triton 3.6) takes the bits of bfloat16 for integers."""
    if EMULATE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc)


@triton.jit
def rotate(x, ROWS: tl.constexpr, D: tl.constexpr, EMULATE: tl.constexpr):
    """Each 64 numbers of x (ROWS, D) times the matrix above, in float32.

    Products of 16-bit numbers are exact. float32 goes in as a sum of two bfloat16, which leaves out 2**-17 of it.
    More than 64 at a time spread spikes no better (docs/int8.md) and take more registers and shared memory.
    """
    parts = x.reshape(ROWS * (D // BLOCK), BLOCK)
    if x.dtype == tl.float32:
        # Halved, as float32's largest number would be rounded up to infinity.
        parts, matrix = parts * 0.5, (signed_hadamard(tl.float32) * 2.0).to(tl.bfloat16)
        high = narrow(parts, tl.bfloat16, EMULATE)
        low = narrow(parts - high.to(tl.float32), tl.bfloat16, EMULATE)
        rotated = dot(low, matrix, dot(high, matrix, None, EMULATE), EMULATE)
    else:
        rotated = dot(parts, signed_hadamard(x.dtype), None, EMULATE)
    return rotated.reshape(ROWS, D)


@triton.jit
def rotate_one(x, D: tl.constexpr):
    """The same of one row in float32, x (D)."""
    parts = x.reshape(D // BLOCK, BLOCK, 1) * signed_hadamard(tl.float32)[None, :, :]
    return tl.sum(parts, 1).reshape(D)


@triton.jit
def to_int8(x, largest):
    """x / largest · 127, rounded to int8, where |x| <= largest."""
    scaled = x / tl.maximum(largest, TINY) * 127.0
    return ((scaled + ROUNDING) - ROUNDING).to(tl.int8)


@triton.jit
def poison(x, axis: tl.constexpr):
    """0 for each row of x that is finite, NaN for each that is not: int8 has no NaN of its own to hand on."""
    return tl.sum(x * 0.0, axis)


@triton.jit
def to_e4m3(x, EMULATE: tl.constexpr):
    """x as e4m3, rounded to the nearest, halves to even; beyond 448 it is 448.

    A GPU has an instruction for it. Triton's interpreter (3.6) rounds wrongly, 31.01 to 16, so there (EMULATE) the
    number is put on e4m3's grid in float32 first, and what the interpreter then does is exact.
    """
    if EMULATE:
        x = tl.clamp(x, -448.0, 448.0)
        # Adding and subtracting 1.5 · 2**23 units in the last place leaves three bits behind the leading one.
        exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
        unit = ((exponent - 3 + 23) << 23).to(tl.float32, bitcast=True) * 1.5
        x = (x + unit) - unit
    return x.to(tl.float8e4nv)


@triton.jit
def narrow(x, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """x in float32 as `dtype`, rounded to the nearest; for the interpreter (EMULATE) bfloat16 as e4m3 above."""
    if EMULATE and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def relabel_keys(x, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """(ROWS, KEYS) with the keys of each 16 in another order: 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15.

    A thread holds scores in the order in which the tensor core gave them, and 8-bit operands are wanted in another.
    Instead of moving them between threads, P's keys are called by other names; V is stored with the same ones.
    """
    return x.reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)


@triton.jit
def scale_places(tokens):
    """Where the scales of these keys lie: of each 32 keys, those that one thread holds side by side. `read_scales`."""
    return (tokens & -32) + ((tokens >> 1) & 3) * 8 + ((tokens >> 3) & 3) * 2 + (tokens & 1)


@triton.jit
def read_scales(place, BN: tl.constexpr):
    """The scales of BN keys, in the keys' order. A thread reads 16 bytes at a time where it would read 8."""
    return tl.load(place + tl.arange(0, BN)).reshape(BN // 32, 4, 4, 2).permute(0, 2, 1, 3).reshape(BN)


@triton.jit
def mask_rows(Mask, queries, q_len, m_sn, BY_QUERY: tl.constexpr):
    """Pointers to the rows of the mask, (BM, 1), or (1, 1) where one row is for all queries (BY_QUERY False).

    Queries beyond the last read its row: what comes of them is never written.
    """
    if BY_QUERY:
        rows = Mask + tl.minimum(queries, q_len - 1).to(tl.int64)[:, None] * m_sn
    else:
        rows = Mask + tl.zeros([1, 1], tl.int32)
    return rows


@triton.jit
def read_mask(rows, start, kv_len, m_sm, BN: tl.constexpr, MASK: tl.constexpr, BOUND: tl.constexpr):
    """What to add to the scores of keys from `start` on, in units of log2; (BM, BN), or (1, BN) from a single row.

    0 or -inf from a bool mask, its numbers from a float one. With BOUND, keys beyond kv_len are hidden.
    """
    keys = tl.arange(0, BN)
    place = rows + (start + keys).to(tl.int64)[None, :] * m_sm
    if BOUND:
        there = (keys < kv_len - start)[None, :]
        numbers = tl.load(place, mask=there, other=0)
    else:
        numbers = tl.load(place)
    if MASK == "bool":
        bias = tl.where(numbers != 0, 0.0, float("-inf"))
    else:
        # -3e38 hides a key only beside others: in a row full of it all keys count alike, as in PyTorch.
        numbers = numbers.to(tl.float32)
        bias = tl.clamp(numbers * LOG2E, -3e38, 3e38, propagate_nan=tl.PropagateNan.ALL)
        bias = tl.where(numbers == float("-inf"), numbers, bias)
    if BOUND:
        bias = tl.where(there, bias, float("-inf"))
    return bias


@triton.jit
def base_of(largest, LOG2_TOP: tl.constexpr):
    """What to subtract from powers of two of which `largest` is the largest, for weights of at most 2**LOG2_TOP.

    Rounding may leave a maximum, and what is subtracted from it, too small by 2**-23 of it. Where scores are large that
    would be a weight beyond e4m3's largest number, which cuts it. So the maximum is raised by 2**-22 of itself, but by
    no more than leaves it a weight of 1: masks add numbers of any size.
    """
    if LOG2_TOP > 0.0:
        largest -= tl.maximum(LOG2_TOP - tl.abs(largest) * 2.0**-22, 0.0)
    return largest


@triton.jit
def weigh(logits, scale, row_base, row_sum, LOG2_TOP: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867), to the base 2.

    logits (BM, BN) times scale (BM), or by themselves where that is None, are powers of two; only then they may be
    -inf. Returns the weights of these keys, at most 2**LOG2_TOP, the factor for what was summed up before, and of each
    row what its powers of two are less by now (`base_of`) and the sum of its weights.
    """
    if scale is None:
        new_base = tl.maximum(row_base, base_of(tl.max(logits, 1), LOG2_TOP))
        # A row that has seen no key yet: any finite number will do, its weights are exp2(-inf).
        base = tl.where(new_base == float("-inf"), 0.0, new_base)
        weights = tl.math.exp2(logits - base[:, None])
    else:
        # The maximum before scaling, so that scaling and subtracting are one instruction.
        new_base = tl.maximum(row_base, base_of(tl.max(logits, 1) * scale, LOG2_TOP))
        base = new_base
        weights = tl.math.exp2(logits * scale[:, None] - base[:, None])
    shrink = tl.math.exp2(row_base - base)
    return weights, shrink, new_base, row_sum * shrink + tl.sum(weights, 1)
