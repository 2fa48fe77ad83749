"""The loop of forward.py on 16-bit tensors as they are: nothing is rounded but the weights, as in FlashAttention 2."""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2E, dot, mask_rows, narrow, read_mask, weigh


@triton.jit
def load_rows(
    X, batch, token, head, dims, length, x_sn, x_sd, dim,
    D: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, PADDED: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """(BN, D): rows of a head from `token` on, 0 beyond its end where BOUND says that it may come into view.

    With TMA, X is a tensor descriptor of (B, tokens, heads, dim), which knows its ends, else a pointer to the head.
    """
    if TMA:
        x = X.load([batch, token, head, 0]).reshape(BN, D)
    else:
        rows = token + tl.arange(0, BN)
        place = rows.to(tl.int64)[:, None] * x_sn + dims.to(tl.int64)[None, :] * x_sd
        if PADDED or BOUND:
            x = tl.load(X + place, mask=(rows < length)[:, None] & (dims < dim)[None, :], other=0.0)
        else:
            x = tl.load(X + place)
    return x


@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len"])
def attend_exact(
    Q, K, V, Mask, Out,
    q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, o_sb, o_sh, o_sn, o_sd,
    m_sb, m_sh, m_sn, m_sm, heads, group, q_len, kv_len, dim, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PADDED: tl.constexpr, WIDE: tl.constexpr, MASK: tl.constexpr, BY_QUERY: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Grid: heads of the batch · tiles of BM queries."""
    tiles = tl.cdiv(q_len, BM)
    program = tl.program_id(0)
    batch = (program // tiles // heads).to(tl.int64)
    head = (program // tiles % heads).to(tl.int64)
    key_head = head // group
    first_query = (program % tiles) * BM
    queries = first_query + tl.arange(0, BM)
    keys = tl.arange(0, BN)
    dims = tl.arange(0, D)
    if not TMA:
        K += batch * k_sb + key_head * k_sh
        V += batch * v_sb + key_head * v_sh
    if MASK != "":
        rows = mask_rows(Mask + batch * m_sb + head * m_sh, queries, q_len, m_sn, BY_QUERY)
    batch32, head32 = batch.to(tl.int32), key_head.to(tl.int32)

    Q += batch * q_sb + head * q_sh + first_query.to(tl.int64) * q_sn
    row = tl.arange(0, BM).to(tl.int64 if WIDE else tl.int32)  # 64 bits take registers that the loop needs
    there = (row < q_len - first_query)[:, None]
    if PADDED:
        there = there & (dims < dim)[None, :]
    q = tl.load(Q + row[:, None] * q_sn + dims.to(tl.int64)[None, :] * q_sd, mask=there, other=0.0)
    # In float32, which changes nothing: the interpreter cannot negate bfloat16.
    q = tl.where(scale < 0, -q.to(tl.float32), q.to(tl.float32)).to(q.dtype)
    q_scale = tl.zeros([BM], tl.float32) + tl.abs(scale) * LOG2E

    row_base = tl.full([BM], float("-inf"), tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    unscaled = None if MASK != "" else q_scale  # with a mask, logits are scaled before it is added
    last = (kv_len - 1) // BN * BN
    k = load_rows(K, batch32, 0, head32, dims, kv_len, k_sn, k_sd, dim, D, BN, TMA, PADDED, True)
    scores = dot(q, tl.trans(k), None, EMULATE)
    for start in tl.range(0, last, BN, num_stages=STAGES):
        # The next scores are computed while these are weighed: forward.py.
        if MASK != "":
            scores = scores * q_scale[:, None] + read_mask(rows, start, kv_len, m_sm, BN, MASK, False)
        k = load_rows(K, batch32, start + BN, head32, dims, kv_len, k_sn, k_sd, dim, D, BN, TMA, PADDED, True)
        next_scores = dot(q, tl.trans(k), None, EMULATE)
        weights, shrink, row_base, row_sum = weigh(scores, unscaled, row_base, row_sum, 0.0)
        v = load_rows(V, batch32, start, head32, dims, kv_len, v_sn, v_sd, dim, D, BN, TMA, PADDED, False)
        acc = dot(narrow(weights, v.dtype, EMULATE), v, acc * shrink[:, None], EMULATE)
        scores = next_scores

    if MASK != "":
        bias = read_mask(rows, last, kv_len, m_sm, BN, MASK, True)
    else:
        bias = tl.where(last + keys < kv_len, 0.0, float("-inf"))[None, :]
    scores = scores * q_scale[:, None] + bias
    weights, shrink, row_base, row_sum = weigh(scores, None, row_base, row_sum, 0.0)
    v = load_rows(V, batch32, last, head32, dims, kv_len, v_sn, v_sd, dim, D, BN, TMA, PADDED, True)
    acc = dot(narrow(weights, v.dtype, EMULATE), v, acc * shrink[:, None], EMULATE)

    acc = tl.where(row_sum[:, None] == 0.0, 0.0, acc / row_sum[:, None])  # no key at all: zeros, as in PyTorch
    Out += batch * o_sb + head * o_sh + first_query.to(tl.int64) * o_sn
    tl.store(
        Out + row[:, None] * o_sn + dims.to(tl.int64)[None, :] * o_sd,
        narrow(acc, Out.dtype.element_ty, EMULATE),
        mask=there,
    )
