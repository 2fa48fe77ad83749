"""From tensors to launches: buffers and arguments of the kernels in quantise.py and forward.py."""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .._common import capability
from .exact import attend_exact
from .forward import attend
from .quantise import CHUNK_ROWS, HEAD_ROWS, collect_statistics, quantise
from .tiles import EXACT, INT8, Tile, at_once, chunk_plan, tile_for, width_of

# TRITON_INTERPRET=1 was set when Triton was imported: kernels run on the CPU, for tests.
INTERPRETED = not isinstance(attend, triton.JITFunction)
_HALF_LARGEST = {dtype: torch.finfo(dtype).max / 2 for dtype in (torch.float16, torch.bfloat16, torch.float32)}


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
    batch, q_len, heads, dim = q.shape
    kv_len, kv_heads = k.shape[1], k.shape[2]
    if tile is None:
        tile = tile_for(INT8, capability(q), dim, mask is not None)
    width, plan = width_of(dim), chunk_plan(kv_len)
    key_heads = batch * kv_heads
    device, float32 = q.device, torch.float32
    out = torch.empty((batch, q_len, heads, dim), dtype=q.dtype, device=device)
    k8 = torch.empty((key_heads * plan.padded, width), dtype=torch.int8, device=device)
    if tile.fp8:
        v8 = torch.empty((key_heads * width, plan.padded), dtype=torch.float8_e4m3fn, device=device)
    else:
        v8 = torch.empty((key_heads * plan.padded, width), dtype=torch.float16, device=device)
    k_scale = torch.empty((key_heads, plan.padded), dtype=float32, device=device)
    rows = plan.chunks * CHUNK_ROWS.value + HEAD_ROWS.value
    numbers = torch.empty((key_heads, rows, width), dtype=float32, device=device)

    strides = *strides_of(k), *strides_of(v)
    programs = key_heads * plan.chunks
    collect_statistics[(programs,)](
        k, v, numbers, *strides, kv_heads, kv_len, dim, plan.chunk, plan.chunks,
        D=width, BT=at_once(width), num_warps=8,
    )  # fmt: skip
    quantise[(programs, 2)](
        k, v, numbers, k8, k_scale, v8, *strides,
        kv_heads, kv_len, plan.padded, dim, plan.chunk, plan.chunks,
        D=width, BT=at_once(width), ROTATE=tile.rotate, FP8=tile.fp8, EMULATE=INTERPRETED, num_warps=8,
    )  # fmt: skip
    keys, values = k8, v8
    if tile.tma:
        keys = TensorDescriptor.from_tensor(k8, [tile.bn, width])
        values = TensorDescriptor.from_tensor(v8, [width, tile.bn] if tile.fp8 else [tile.bn, width])
    attend[(batch * heads * -(-q_len // tile.bm),)](
        q, keys, k_scale, values, numbers, q if mask is None else mask, out,
        *strides_of(q), *strides_of(out), *mask_strides(mask),
        heads, heads // kv_heads, q_len, kv_len, plan.padded, dim, plan.chunks,
        scale_of(dim, scale), _HALF_LARGEST[q.dtype],
        BM=tile.bm, BN=tile.bn, D=width, STAGES=tile.stages, PADDED=dim != width, WIDE=wide(q, tile.bm),
        ROTATE=tile.rotate, FP8=tile.fp8, TMA=tile.tma,
        MASK=mask_kind(mask), BY_QUERY=mask is not None and mask.shape[2] != 1, EMULATE=INTERPRETED,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
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
    batch, q_len, heads, dim = q.shape
    kv_len, kv_heads = k.shape[1], k.shape[2]
    if tile is None:
        tile = tile_for(EXACT, capability(q), dim, mask is not None)
    width = width_of(dim)
    out = torch.empty((batch, q_len, heads, dim), dtype=q.dtype, device=q.device)
    tma = tile.tma and fits_tma(k) and fits_tma(v)
    block = [1, tile.bn, 1, width]
    attend_exact[(batch * heads * -(-q_len // tile.bm),)](
        q, descriptor(k, block) if tma else k, descriptor(v, block) if tma else v, q if mask is None else mask, out,
        *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(out), *mask_strides(mask),
        heads, heads // kv_heads, q_len, kv_len, dim, scale_of(dim, scale),
        BM=tile.bm, BN=tile.bn, D=width, STAGES=tile.stages, TMA=tma, PADDED=dim != width, WIDE=wide(q, tile.bm),
        MASK=mask_kind(mask), BY_QUERY=mask is not None and mask.shape[2] != 1, EMULATE=INTERPRETED,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def wide(q: torch.Tensor, rows: int) -> bool:
    """Do places in a tile of so many rows of q need 64 bits? Those of the output never do: it is contiguous."""
    return q.stride(1) * rows >= 2**31


def strides_of(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Those of (B, tokens, H, D) in the order in which kernels take them: batch, head, token, channel."""
    batch, token, head, channel = tensor.stride()
    return batch, head, token, channel


def scale_of(dim: int, scale: float | None) -> float:
    """The scale as a number that float32 has: what is too large is cut, what is too small is 0."""
    scale = dim**-0.5 if scale is None else float(scale)
    return 0.0 if abs(scale) < 2.0**-126 else max(-3e38, min(scale, 3e38))


def _steps(tensor: torch.Tensor) -> list[int]:
    """Strides; that of a dimension of size 1 is one that a tensor descriptor takes, as nobody uses it."""
    return [step if size > 1 else 16 for size, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]


def fits_tma(tensor: torch.Tensor) -> bool:
    """Can a tensor descriptor stand for it? It wants channels side by side, and rows that begin at 16 bytes."""
    size = tensor.element_size()
    rows = all(step > 0 and step * size % 16 == 0 for step in _steps(tensor))
    return rows and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0


def descriptor(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), [*_steps(tensor), 1], block)


def mask_strides(mask: torch.Tensor | None) -> tuple[int, ...]:
    """Batch, head, query and key strides, 0 where the mask broadcasts."""
    if mask is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))


def mask_kind(mask: torch.Tensor | None) -> str:
    return "" if mask is None else "bool" if mask.dtype is torch.bool else "float"
