"""Our own attention in plain torch: sliced over batch, heads and queries, so that few scores exist at a time.

They take an eighth of what inputs and output take, at least 4 MiB and at most 64 MiB. It needs less memory than
anything else here and runs everywhere, slowly. Scores, weights and sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.call import AttentionCall, Layout
from ..attention.kernel import Kernel, Needs, Run, RunLse
from ._common import ANY_MASK, FULL

_MOST = 2**24  # numbers in one slice of scores: 64 MiB in float32
_LEAST = 2**20  # smaller slices save little and take longer
_SHARE = 8  # with keys and values of a head in float32 a long call then stays within a fifth of inputs and output


def _most(batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, width: int, itemsize: int) -> int:
    """How many numbers a slice of scores may hold. `width` is what a key and a value hold together."""
    held = batch * (heads * q_len + kv_heads * kv_len) * width * itemsize
    return min(_MOST, max(_LEAST, held // (4 * _SHARE)))


def _steps(
    batch: int, kv_heads: int, groups: int, q_len: int, kv_len: int, width: int, most: int
) -> tuple[int, int, int, int]:
    """How many batches, key heads, query heads per key head and queries to take at a time, for `most` scores.

    `width` is what a key and a value hold together: they are brought to float32 in slices of about the same size.
    """
    queries = max(1, min(q_len, most // kv_len))
    if queries < q_len:
        return 1, 1, 1, queries
    inner = max(1, min(groups, most // (q_len * kv_len)))
    if inner < groups:
        return 1, 1, inner, q_len
    heads = max(1, min(kv_heads, most // (kv_len * max(groups * q_len, width))))
    if heads < kv_heads:
        return 1, heads, groups, q_len
    return max(1, min(batch, most // (kv_heads * kv_len * max(groups * q_len, width)))), kv_heads, groups, q_len


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _part(mask: Tensor, *where: slice) -> Tensor:
    return mask[tuple(index if mask.shape[dim] != 1 else slice(None) for dim, index in enumerate(where))]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    lse: Tensor | None,
) -> Tensor:
    """`run`; where `lse` (B, H, N) is given the log-sum-exp of each row is written to it."""
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    groups = heads // kv_heads
    scale = dim**-0.5 if scale is None else scale
    # Memory in the order (B, N, H, D): hosts want (B, N, H·D) and get it without a copy.
    out = torch.empty(batch, q_len, heads, v_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    q, grouped = q.unflatten(1, (kv_heads, groups)), out.unflatten(1, (kv_heads, groups))
    if mask is not None:
        mask = mask.unflatten(1, (kv_heads, groups)) if mask.shape[1] != 1 else mask.unsqueeze(2)
    sums = None if lse is None else lse.unflatten(1, (kv_heads, groups))
    most = _most(batch, heads, kv_heads, q_len, kv_len, dim + v_dim, q.element_size())
    b_step, h_step, g_step, n_step = _steps(batch, kv_heads, groups, q_len, kv_len, dim + v_dim, most)
    lowest = torch.finfo(torch.float32).min
    for b in _slices(batch, b_step):
        for h in _slices(kv_heads, h_step):
            keys, values = k[b, h].float().mT, v[b, h].float()
            for g in _slices(groups, g_step):
                for n in _slices(q_len, n_step):
                    part = q[b, h, g, n].float()
                    shape = part.shape[2:4]
                    scores = (part * scale).flatten(2, 3) @ keys
                    if mask is not None:
                        hidden = _part(mask, b, h, g, n)
                        view = scores.unflatten(2, shape)
                        if hidden.dtype is torch.bool:
                            view.masked_fill_(~hidden, float("-inf"))
                        else:
                            view.add_(hidden)
                    top = scores.amax(-1, keepdim=True).clamp_(min=lowest)
                    scores.sub_(top).exp_()
                    total = scores.sum(-1, keepdim=True)
                    if sums is not None:
                        sums[b, h, g, n] = top.add_(total.log()).squeeze(-1).unflatten(2, shape)
                    done = (scores @ values).div_(total if mask is None else total.clamp_(min=1e-30))
                    grouped[b, h, g, n] = done.unflatten(2, shape).to(out.dtype)
                    del scores, done, part
    return out


def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V. A row whose keys are all hidden gives zeros, as in torch."""
    return _attend(q, k, v, mask, scale, None)


def run_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`run`, and the log-sum-exp of each row; -inf where all keys are hidden."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return _attend(q, k, v, mask, scale, lse), lse


def _load() -> Run:
    return run


def _load_lse() -> RunLse:
    return run_lse


def _workspace(call: AttentionCall) -> int:
    groups = call.heads // call.kv_heads
    width = call.head_dim + call.v_dim
    most = _most(call.batch, call.heads, call.kv_heads, call.q_len, call.kv_len, width, call.dtype.itemsize)
    b, h, g, n = _steps(call.batch, call.kv_heads, groups, call.q_len, call.kv_len, width, most)
    rows = b * h * g * n
    # Scores; keys and values in float32; queries twice (as they are and scaled), the result and two sums.
    return 4 * (rows * call.kv_len + b * h * call.kv_len * width + rows * (2 * call.head_dim + 2 * call.v_dim + 2))


KERNELS = (
    Kernel(
        name="split",
        title="Sliced attention in plain PyTorch",
        package="",
        layout=Layout.BHND,
        precision="exact",
        # Its own arithmetic is float32; what remains is the rounding of the output.
        tolerance={torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3},
        load=_load,
        load_lse=_load_lse,
        needs_proof=False,
        needs=Needs(
            devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
            dtypes=FULL,
            head_dims=range(1, 4097),
            masks=ANY_MASK,
            gqa=True,
            other_v_dim=True,
        ),
        workspace_bytes=_workspace,
    ),
)
