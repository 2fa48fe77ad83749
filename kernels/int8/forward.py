"""softmax(scale · Q Kᵀ + mask) V on quantised keys and values: one program per head and tile of BM queries."""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    BLOCK,
    CHUNKS,
    LOG2E,
    mask_rows,
    narrow,
    poison,
    read_mask,
    read_scales,
    relabel_keys,
    rotate,
    to_e4m3,
    to_int8,
    weigh,
)
from .quantise import CHUNK_ROWS, HEAD_ROWS, K_BOUND, RESIDUAL, V_MEAN, V_SCALE

# The bound below on scores, in powers of two, is cut to this, so that nothing overflows. It takes K before its mean is
# subtracted, and all of its channels aligned with Q: scores themselves are far smaller. `base_of` keeps weights right.
LARGEST_SCORE = tl.constexpr(2.0**26)


@triton.jit
def load_keys(K8, token, D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """(D, BN): the keys from `token` on."""
    if TMA:
        k = K8.load([token, 0]).T
    else:
        k = tl.load(K8 + (token + tl.arange(0, BN))[None, :] * D + tl.arange(0, D)[:, None])
    return k


@triton.jit
def load_values(
    V8, token, first, first_dim, kv_pad, D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr
):  # fmt: skip
    """(BN, D): the values from `token` on, in a head that starts at row `first` or `first_dim` of V8."""
    keys, dims = token + tl.arange(0, BN), tl.arange(0, D)
    if FP8 and TMA:
        v = V8.load([first_dim, token]).T
    elif FP8:
        v = tl.load(V8 + keys[:, None] + dims.to(tl.int64)[None, :] * kv_pad)
    elif TMA:
        v = V8.load([first + token, 0])
    else:
        v = tl.load(V8 + keys[:, None] * D + dims[None, :])
    return v


@triton.jit
def add_values(
    acc, weights, shrink, v, BM: tl.constexpr, BN: tl.constexpr, FP8: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """acc · shrink + weights · v."""
    if FP8:
        # Tensor cores add e4m3 products with some 13 bits: a fresh sum per block, added up in float32. Written as a sum
        # of a product, Triton would have the tensor core add it up, but for Hopper.
        acc = tl.fma(acc, shrink[:, None], tl.dot(relabel_keys(to_e4m3(weights, EMULATE), BM, BN), v))
    else:
        acc = tl.dot(weights.to(tl.float16), v, acc * shrink[:, None])
    return acc


@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len", "chunks"])
def attend(
    Q, K8, KScale, V8, Numbers, Mask, Out,
    q_sb, q_sh, q_sn, q_sd, o_sb, o_sh, o_sn, o_sd, m_sb, m_sh, m_sn, m_sm,
    heads, group, q_len, kv_len, kv_pad, dim, chunks, scale, half_largest,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    ROTATE: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr, BY_QUERY: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Grid: heads of the batch · tiles of BM queries; a head's tiles run one after the other and share its keys in L2.

    With TMA, K8 and V8 are tensor descriptors over all heads, else pointers.
    """
    tiles = tl.cdiv(q_len, BM)
    program = tl.program_id(0)
    batch = (program // tiles // heads).to(tl.int64)
    head = (program // tiles % heads).to(tl.int64)
    key_head = batch * (heads // group) + head // group
    first_query = (program % tiles) * BM
    queries = first_query + tl.arange(0, BM)
    keys = tl.arange(0, BN)
    dims = tl.arange(0, D)
    Numbers += key_head * (chunks * CHUNK_ROWS + HEAD_ROWS) * D
    of_head = Numbers + chunks * CHUNK_ROWS * D
    KScale += key_head * kv_pad
    first, first_dim = 0, 0
    if TMA:
        first, first_dim = (key_head * kv_pad).to(tl.int32), (key_head * D).to(tl.int32)
    else:
        K8 += key_head * kv_pad * D
        V8 += key_head * kv_pad * D
    if MASK != "":
        rows = mask_rows(Mask + batch * m_sb + head * m_sh, queries, q_len, m_sn, BY_QUERY)

    # Q is rounded here: a tile is used by nobody else, and this saves a pass over memory.
    Q += batch * q_sb + head * q_sh + first_query.to(tl.int64) * q_sn
    row = tl.arange(0, BM).to(tl.int64 if WIDE else tl.int32)  # 64 bits take registers that the loop needs
    there = (row < q_len - first_query)[:, None]
    if PADDED:
        there = there & (dims < dim)[None, :]
    q = tl.load(Q + row[:, None] * q_sn + dims.to(tl.int64)[None, :] * q_sd, mask=there, other=0.0)
    q = rotate(q, BM, D, EMULATE) if ROTATE else q.to(tl.float32) * 0.5
    largest = tl.max(tl.abs(q), 1)
    # What halving and rotating have divided scores by, and the two factors 127 of int8.
    unit: tl.constexpr = LOG2E * (4 * BLOCK if ROTATE else 4) / (127.0 * 127.0)
    q_scale = tl.minimum(largest * tl.abs(scale) * unit, 1e38) * tl.load(of_head + K_BOUND * D)
    q_scale = tl.minimum(q_scale, LARGEST_SCORE / (127.0 * 127.0 * D)) + poison(q, 1)
    q = to_int8(tl.where(scale < 0, -q, q), largest[:, None])

    row_base = tl.full([BM], float("-inf"), tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    # The largest weight: almost e4m3's largest number, so that small weights keep more bits; in fp16 there are enough.
    top: tl.constexpr = 8.8073 if FP8 else 0.0
    unscaled = None if MASK != "" else q_scale  # with a mask, logits are scaled before it is added
    last = (kv_len - 1) // BN * BN
    scores = tl.dot(q, load_keys(K8, first, D, BN, TMA))
    for start in tl.range(0, last, BN, num_stages=STAGES):
        # Scores become float32 first: their registers are free then for the next ones, which are computed under the
        # exponentials. docs/int8.md, "The loop".
        logits = scores.to(tl.float32) * read_scales(KScale + start, BN)[None, :]
        if MASK != "":
            logits = logits * q_scale[:, None] + read_mask(rows, start, kv_len, m_sm, BN, MASK, False)
        next_scores = tl.dot(q, load_keys(K8, first + start + BN, D, BN, TMA))
        weights, shrink, row_base, row_sum = weigh(logits, unscaled, row_base, row_sum, top)
        v = load_values(V8, start, first, first_dim, kv_pad, D, BN, TMA, FP8)
        acc = add_values(acc, weights, shrink, v, BM, BN, FP8, EMULATE)
        scores = next_scores

    # The last block, which may be shorter, stands apart: so the loop above needs no bounds.
    logits = scores.to(tl.float32) * read_scales(KScale + last, BN)[None, :]
    if MASK != "":
        bias = read_mask(rows, last, kv_len, m_sm, BN, MASK, True)
    else:
        bias = tl.where(last + keys < kv_len, 0.0, float("-inf"))[None, :]
    logits = logits * q_scale[:, None] + bias
    weights, shrink, row_base, row_sum = weigh(logits, None, row_base, row_sum, top)
    v = load_values(V8, last, first, first_dim, kv_pad, D, BN, TMA, FP8)
    acc = add_values(acc, weights, shrink, v, BM, BN, FP8, EMULATE)

    # Values went in as (v/2 - mean) / v_scale.
    mean = tl.load(of_head + V_MEAN * D + dims)
    if FP8:
        part = tl.arange(0, CHUNKS)[:, None]
        residual = Numbers + (part * CHUNK_ROWS + RESIDUAL) * D + dims[None, :]
        rounded_off = tl.load(residual, mask=part < chunks, other=0.0)
        mean += tl.sum(rounded_off, 0)
    acc = acc / row_sum[:, None] * tl.load(of_head + V_SCALE * D + dims)[None, :] + mean[None, :]
    acc = tl.where(row_sum[:, None] == 0.0, 0.0, acc)  # no key at all: zeros, as in PyTorch
    acc = 2.0 * tl.clamp(acc, -half_largest, half_largest, propagate_nan=tl.PropagateNan.ALL)
    Out += batch * o_sb + head * o_sh + first_query.to(tl.int64) * o_sn
    tl.store(
        Out + row[:, None] * o_sn + dims.to(tl.int64)[None, :] * o_sd,
        narrow(acc, Out.dtype.element_ty, EMULATE),
        mask=there,
    )
