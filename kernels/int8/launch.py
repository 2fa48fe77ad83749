"""From tensors to launches: buffers and arguments of the kernels in quantise.py, forward.py and exact.py.

What follows from shapes, strides and types alone is worked out once for each kind of call, and kept.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

from .exact import attend_exact
from .forward import attend
from .launched import Buffers, Described, Launch
from .quantise import CHUNK_ROWS, HEAD_ROWS, collect_statistics, quantise
from .tiles import SHORT_KEYS, Tile, at_once, chunk_plan, width_of
from .tuning import tile_on

# TRITON_INTERPRET=1 was set when Triton was imported: kernels run on the CPU, for tests.
INTERPRETED = not isinstance(attend, triton.JITFunction)
_HALF_LARGEST = {dtype: torch.finfo(dtype).max / 2 for dtype in (torch.float16, torch.bfloat16, torch.float32)}
_KINDS = 512  # of calls that are kept: a run has a few, but lengths of prompts come and go
# (q, k, v, mask or q, out) → None.
Attend = Callable[..., None]


class Signature(NamedTuple):
    """All of a call but its addresses: shapes and strides in the order (B, tokens, H, D).

    `device` is the GPU's number, -1 a CPU. `aligned`: all addresses are divisible by 16.
    """

    device: int
    q: tuple[int, ...]
    q_strides: tuple[int, ...]
    k: tuple[int, ...]
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    mask: tuple[int, ...] | None
    mask_strides: tuple[int, ...]
    mask_kind: str
    scale: float
    aligned: bool


def signature_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> Signature:
    addresses = q.data_ptr() | k.data_ptr() | v.data_ptr()
    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()
    kind = ""
    if mask is not None:
        addresses |= mask.data_ptr()
        shape, strides, kind = tuple(mask.shape), mask.stride(), "bool" if mask.dtype is torch.bool else str(mask.dtype)
    return Signature(
        q.get_device(), q.shape, q.stride(), k.shape, k.stride(), v.stride(), (q.dtype, k.dtype, v.dtype),
        shape, strides, kind, q.shape[3] ** -0.5 if scale is None else float(scale), not addresses & 15,
    )  # fmt: skip


def int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """softmax(scale · Q Kᵀ + mask) V in three launches.

    q (B, N, H, D), k and v (B, M, Hkv, D) with any strides, mask and scale as in `Run`. Returns (B, N, H, D).
    `tile` is for tests and benchmarks; by default it is what fits the GPU and the call.
    """
    signature = signature_of(q, k, v, mask, scale)
    if tile is None:
        tile = tile_on("attune_int8", signature.device, q.shape[3], mask is not None, k.shape[1] <= SHORT_KEYS)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _int8(signature, tile)(q, k, v, q if mask is None else mask, out)
    return out


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The same of 16-bit tensors as they are, in one launch."""
    signature = signature_of(q, k, v, mask, scale)
    if tile is None:
        tile = tile_on("attune_bf16", signature.device, q.shape[3], mask is not None)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _exact(signature, tile)(q, k, v, q if mask is None else mask, out)
    return out


@functools.lru_cache(maxsize=_KINDS)
def _int8(call: Signature, tile: Tile) -> Attend:
    (batch, q_len, heads, dim), (kv_len, kv_heads) = call.q, call.k[1:3]
    width, chunks = width_of(dim), chunk_plan(kv_len)
    key_heads = batch * kv_heads
    rows = chunks.chunks * CHUNK_ROWS.value + HEAD_ROWS.value
    values = (key_heads * width, chunks.padded) if tile.fp8 else (key_heads * chunks.padded, width)
    buffers = Buffers(
        (
            ((key_heads, rows, width), torch.float32),
            ((key_heads * chunks.padded, width), torch.int8),
            ((key_heads, chunks.padded), torch.float32),
            (values, torch.float8_e4m3fn if tile.fp8 else torch.float16),
        ),
        INTERPRETED,
    )
    strides = *strides_of(call.k_strides), *strides_of(call.v_strides)
    programs, sizes = key_heads * chunks.chunks, {"D": width, "BT": at_once(width)}
    statistics = Launch(
        collect_statistics, (programs, 1, 1),
        (*strides, kv_heads, kv_len, dim, chunks.chunk, chunks.chunks), sizes, call.aligned, num_warps=8,
    )  # fmt: skip
    rounding = Launch(
        quantise, (programs, 2, 1),
        (*strides, kv_heads, kv_len, chunks.padded, dim, chunks.chunk, chunks.chunks),
        {**sizes, "ROTATE": tile.rotate, "FP8": tile.fp8, "EMULATE": INTERPRETED}, call.aligned, num_warps=8,
    )  # fmt: skip
    loop = Launch(
        attend, (batch * heads * -(-q_len // tile.bm), 1, 1),
        (
            *strides_of(call.q_strides), *_contiguous(call.q), *mask_strides(call),
            heads, heads // kv_heads, q_len, kv_len, chunks.padded, dim, chunks.chunks,
            finite(call.scale), _HALF_LARGEST[call.dtypes[0]],
        ),
        {
            "BM": tile.bm, "BN": tile.bn, "D": width, "STAGES": tile.stages, "PADDED": dim != width,
            "WIDE": wide(call, tile.bm), "ROTATE": tile.rotate, "FP8": tile.fp8, "TMA": tile.tma,
            "MASK": kind_of(call), "BY_QUERY": by_query(call), "EMULATE": INTERPRETED,
        },
        call.aligned, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    blocks = [tile.bn, width], [width, tile.bn] if tile.fp8 else [tile.bn, width]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, out: torch.Tensor) -> None:
        room = torch.empty(buffers.bytes, dtype=torch.uint8, device=q.device)
        numbers, k8, k_scale, v8 = buffers.parts(room)
        statistics(k, v, numbers)
        rounding(k, v, numbers, k8, k_scale, v8)
        if tile.tma:
            k8 = Described(k8, (key_heads * chunks.padded, width), (width, 1), blocks[0])
            v8 = Described(v8, values, (values[1], 1), blocks[1])
        loop(q, k8, k_scale, v8, numbers, mask, out)

    return run


@functools.lru_cache(maxsize=_KINDS)
def _exact(call: Signature, tile: Tile) -> Attend:
    (batch, q_len, heads, dim), (kv_len, kv_heads) = call.q, call.k[1:3]
    width = width_of(dim)
    tma = (
        tile.tma
        and kv_len > 0
        and call.aligned
        and all(fits_tma(call, steps) for steps in (call.k_strides, call.v_strides))
    )
    loop = Launch(
        attend_exact, (batch * heads * -(-q_len // tile.bm), 1, 1),
        (
            *strides_of(call.q_strides), *strides_of(call.k_strides), *strides_of(call.v_strides),
            *_contiguous(call.q), *mask_strides(call),
            heads, heads // kv_heads, q_len, kv_len, dim, finite(call.scale),
        ),
        {
            "BM": tile.bm, "BN": tile.bn, "D": width, "STAGES": tile.stages, "TMA": tma, "PADDED": dim != width,
            "WIDE": wide(call, tile.bm), "MASK": kind_of(call), "BY_QUERY": by_query(call), "EMULATE": INTERPRETED,
        },
        call.aligned, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    block, keys, values = [1, tile.bn, 1, width], _steps(call.k, call.k_strides), _steps(call.k, call.v_strides)

    def run(q: torch.Tensor, k: Any, v: Any, mask: torch.Tensor, out: torch.Tensor) -> None:
        if tma:
            k, v = Described(k, call.k, keys, block), Described(v, call.k, values, block)
        loop(q, k, v, mask, out)

    return run


def wide(call: Signature, rows: int) -> bool:
    """Do places in a tile of so many rows of q need 64 bits? Those of the output never do: it is contiguous."""
    return call.q_strides[1] * rows >= 2**31


def strides_of(strides: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Those of (B, tokens, H, D) in the order in which kernels take them: batch, head, token, channel."""
    batch, token, head, channel = strides
    return batch, head, token, channel


def _contiguous(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    _, tokens, heads, dim = shape
    return tokens * heads * dim, dim, heads * dim, 1


def finite(scale: float) -> float:
    """The scale as a number that float32 has: what is too large is cut, what is too small is 0."""
    return 0.0 if abs(scale) < 2.0**-126 else max(-2e38, min(scale, 2e38))  # times log2(e) it is still finite


def _steps(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides; that of a dimension of size 1 is one that a tensor descriptor takes, as nobody uses it."""
    return *(step if size > 1 else 16 for size, step in zip(shape[:3], strides[:3], strict=True)), 1


def fits_tma(call: Signature, strides: tuple[int, ...]) -> bool:
    """Can a tensor descriptor stand for k or v? It wants channels side by side, and rows that begin at 16 bytes."""
    size = call.dtypes[1].itemsize
    return strides[3] == 1 and all(step > 0 and step * size % 16 == 0 for step in _steps(call.k, strides)[:3])


def mask_strides(call: Signature) -> tuple[int, ...]:
    """Batch, head, query and key strides, 0 where the mask broadcasts."""
    if call.mask is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else step for size, step in zip(call.mask, call.mask_strides, strict=True))


def kind_of(call: Signature) -> str:
    return "" if call.mask is None else "bool" if call.mask_kind == "bool" else "float"


def by_query(call: Signature) -> bool:
    return call.mask is not None and call.mask[2] != 1
