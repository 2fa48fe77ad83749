"""One attention call, described without its tensors.

The host hands over tensors in one of two layouts, masks in five shapes and a handful of keyword arguments. This
module turns that into an `AttentionCall`: plain, hashable data that a plan can be made from. Letters used all over
the pack: B batch, H query heads, N query tokens, M key/value tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch

Kind = Literal["self", "cross"]
MaskKind = Literal["bool", "float"]


class Layout(Enum):
    """Order of the dimensions of the 4-D tensors that a kernel takes and returns."""

    BHND = "BHND"
    BNHD = "BNHD"


class Undescribable(ValueError):
    """The tensors do not fit together in a way this pack understands; only the host may try them."""


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask: what its numbers mean, and its shape brought to four dimensions.

    `kind` is "bool" (True = may attend) or "float" (added to the scaled scores). `shape` is (B or 1, H or 1, N or 1,
    M or 1): a 1 is a dimension that broadcasts.
    """

    kind: MaskKind
    shape: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """softmax(scale · Q Kᵀ + mask) V: everything a decision may depend on, and nothing else.

    Lengths are in tokens. `dtype` is the type the kernel computes in: where q, k and v differ it is the one torch
    promotes them to, and `mixed_dtypes` is set. `device` is "cpu", "cuda:0", … . `scale` None means 1/sqrt(D).
    `fp32_scores` says that the model asked for scores in float32 although its tensors are narrower. `kind` is told
    by the lengths, as the host does not say: "self" where N = M. `block` counts from 0 through the whole model,
    `blocks` is their number; both are None where the model does not tell. `gradient` says that a backward pass may
    follow. `unknown` names arguments that this pack
    does not know: they may change the mathematics, so no kernel takes such a call.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    device: str
    mask: Mask | None = None
    scale: float | None = None
    lossy_allowed: bool = True
    fp32_scores: bool = False
    mixed_dtypes: bool = False
    block: int | None = None
    blocks: int | None = None
    gradient: bool = False
    unknown: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        return "self" if self.q_len == self.kv_len else "cross"

    @property
    def score_bytes(self) -> int:
        """Size in bytes of the (B, H, N, M) score tensor in float32, which only `sdpa_math` and `basic` allocate."""
        return 4 * self.batch * self.heads * self.q_len * self.kv_len


def mask_shape(shape: Sequence[int], batch: int, heads: int, q_len: int, kv_len: int) -> tuple[int, int, int, int]:
    """The four-dimensional shape a mask of `shape` stands for; raises Undescribable where it stands for none.

    The meaning is that of ComfyUI's `attention_pytorch`: (N, M) and (B, N, M) get the missing dimensions, four
    dimensions are taken as they are. Two forms it would reject are understood as well: (B·H, N, M), which diffusers
    sends, and (B, M), a padding mask over keys. Any dimension may be 1.
    """

    def fits(rows: int, keys: int) -> bool:
        return rows in (1, q_len) and keys in (1, kv_len)

    match tuple(shape):
        case (keys,) if keys in (1, kv_len):
            return 1, 1, 1, keys
        case (rows, keys) if fits(rows, keys):
            return 1, 1, rows, keys
        case (rows, keys) if rows == batch and keys == kv_len:
            return batch, 1, 1, keys
        case (first, rows, keys) if first in (1, batch) and fits(rows, keys):
            return first, 1, rows, keys
        case (first, rows, keys) if first == batch * heads and fits(rows, keys):
            return batch, heads, rows, keys
        case (first, second, rows, keys) if first in (1, batch) and second in (1, heads) and fits(rows, keys):
            return first, second, rows, keys
    raise Undescribable(
        f"a mask of shape {tuple(shape)} does not broadcast to (batch {batch}, heads {heads}, "
        f"queries {q_len}, keys {kv_len})"
    )


def _mask_kind(dtype: torch.dtype) -> MaskKind:
    if dtype is torch.bool:
        return "bool"
    if dtype.is_floating_point:
        return "float"
    raise Undescribable(f"a mask of {dtype} is neither bool nor floating point")


def _split(name: str, tensor: torch.Tensor, batch: int, heads: int, dim: int) -> tuple[int, int, int]:
    """(tokens, heads, dim) of a tensor that holds its heads as (B, N, H·D) or (B, N, H, D)."""
    shape = tensor.shape
    if shape[0] != batch:
        raise Undescribable(f"{name} has batch {shape[0]}, the query has {batch}")
    if len(shape) == 4:
        return shape[1], shape[2], shape[3]
    if len(shape) != 3 or heads <= 0 or shape[2] % dim:
        raise Undescribable(f"{name} of shape {tuple(shape)} does not hold heads of dimension {dim}")
    return shape[1], shape[2] // dim, dim


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    *,
    mask: torch.Tensor | None = None,
    skip_reshape: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    fp32_scores: bool = False,
    lossy_allowed: bool = True,
    block: int | None = None,
    blocks: int | None = None,
    gradient: bool = False,
    unknown: tuple[str, ...] = (),
) -> AttentionCall:
    """Describe one call of the host's `attention(q, k, v, heads, …)`.

    With `skip_reshape` q, k, v are (B, H, N, D); without it (B, N, H·D), where k and v may also be (B, N, H, D).
    Raises Undescribable where the shapes do not fit together.
    """
    if skip_reshape:
        if not (q.ndim == k.ndim == v.ndim == 4):
            raise Undescribable(f"q, k, v of {q.ndim}, {k.ndim} and {v.ndim} dimensions; wanted 4 each")
        batch, q_heads, q_len, head_dim = q.shape
        if not (k.shape[0] == v.shape[0] == batch):
            raise Undescribable(f"batches of q, k, v differ: {batch}, {k.shape[0]}, {v.shape[0]}")
        _, kv_heads, kv_len, k_dim = k.shape
        _, v_heads, v_len, v_dim = v.shape
    else:
        if q.ndim != 3 or heads <= 0 or q.shape[2] % heads:
            raise Undescribable(
                f"q of shape {tuple(q.shape)} does not hold {heads} heads as (batch, tokens, heads·dim)"
            )
        batch, q_len, width = q.shape
        q_heads, head_dim = heads, width // heads
        kv_len, kv_heads, k_dim = _split("k", k, batch, heads, head_dim)
        v_len, v_heads, v_dim = _split("v", v, batch, heads, head_dim)
    if q_heads != heads:
        raise Undescribable(f"q holds {q_heads} heads, the call says {heads}")
    if k_dim != head_dim or kv_len != v_len or kv_heads != v_heads:
        raise Undescribable(f"q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit")
    if kv_heads != heads and not (enable_gqa and kv_heads > 0 and heads % kv_heads == 0):
        raise Undescribable(f"{heads} query heads on {kv_heads} key heads without grouped-query attention")
    if min(batch, heads, q_len, kv_len, head_dim, v_dim) < 1:
        raise Undescribable("a tensor is empty")
    if not (q.device == k.device == v.device) or (mask is not None and mask.device != q.device):
        raise Undescribable("q, k, v and the mask are not on one device")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return AttentionCall(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        v_dim=v_dim,
        dtype=dtype,
        device=str(q.device),
        mask=None
        if mask is None
        else Mask(_mask_kind(mask.dtype), mask_shape(mask.shape, batch, heads, q_len, kv_len)),
        scale=scale,
        lossy_allowed=lossy_allowed,
        fp32_scores=fp32_scores and dtype is not torch.float32,
        mixed_dtypes=not (q.dtype == k.dtype == v.dtype),
        block=block,
        blocks=blocks,
        gradient=gradient,
        unknown=unknown,
    )


Shape = tuple[int, ...]


def input_view(
    ndim: int, skip_reshape: bool, shape: tuple[int, int, int, int], layout: Layout
) -> tuple[Shape | None, bool]:
    """How to see a host tensor of `ndim` dimensions in a kernel's layout: (shape to view it as, swap dims 1 and 2).

    `shape` is its (B, N, H, D). Splitting a dimension and swapping two are views for any strides, so nothing is ever
    copied here.
    """
    if skip_reshape:
        return None, layout is not Layout.BHND
    return (None if ndim == 4 else shape), layout is not Layout.BNHD


def output_view(call: AttentionCall, skip_output_reshape: bool, layout: Layout) -> tuple[bool, Shape | None]:
    """How to give a kernel's output back: (swap dims 1 and 2, shape to bring it to).

    The host wants (B, H, N, D), or (B, N, H·D), which is a copy only where the kernel's output lies otherwise.
    """
    if skip_output_reshape:
        return layout is not Layout.BHND, None
    return layout is not Layout.BNHD, (call.batch, call.q_len, call.heads * call.v_dim)
