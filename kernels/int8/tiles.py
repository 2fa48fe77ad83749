"""How big the tiles are, per architecture: data, and the sizes of buffers that follow from a call.

The tiles are without local memory in the loop, by the static reports (benchmarks/static/, benchmarks/int8-log.md), and
the first of each list has about the fewest instructions per score of those with many queries. None has been timed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

TOKENS = 128  # lengths of buffers and chunks are multiples of it; every BN divides it, in INT8 as a multiple of 32
CHUNKS = 64  # at most so many programs for the keys of a head; they leave statistics that are added up in one go
# Up to so many keys V stays in fp16 on every GPU: rounding errors of e4m3 have too few keys to average out over
# (docs/int8.md), and a call that short costs little.
SHORT_KEYS = 2048
WIDTHS = (64, 128, 256)  # what head dimensions are padded to, in the kernels' own buffers and registers
Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """BM queries and BN keys a turn, warps, stages of the pipeline.

    `fp8`: V and its weights are e4m3, else 16 bits. `tma`: K and V come through tensor descriptors, else pointers.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    fp8: bool = False
    tma: bool = False
    rotate: bool = True


# (width, with a mask) → tiles, the one that is taken unmeasured first.
Table = dict[tuple[int, bool], tuple[Tile, ...]]
_AMPERE: Table = {
    (64, False): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    (128, False): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    (256, False): (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
    (64, True): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    (128, True): (Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    (256, True): (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
}
_ADA: Table = {
    (64, False): (Tile(128, 128, 8, 2, fp8=True), Tile(128, 64, 8, 2, fp8=True), Tile(64, 64, 4, 2, fp8=True)),
    (128, False): (Tile(128, 64, 8, 2, fp8=True), Tile(128, 32, 8, 2, fp8=True)),
    (256, False): (Tile(32, 64, 4, 2, fp8=True), Tile(32, 32, 4, 2, fp8=True)),
    (64, True): (Tile(128, 64, 8, 2, fp8=True), Tile(64, 64, 4, 2, fp8=True)),
    (128, True): (Tile(128, 32, 8, 2, fp8=True), Tile(64, 64, 8, 2, fp8=True)),
    (256, True): (Tile(32, 64, 4, 2, fp8=True), Tile(32, 32, 4, 2, fp8=True)),
}
_HOPPER: Table = {
    (64, False): (
        Tile(128, 128, 8, 3, fp8=True, tma=True),
        Tile(128, 128, 8, 2, fp8=True, tma=True),
        Tile(64, 128, 4, 2, fp8=True, tma=True),
    ),
    (128, False): (
        Tile(128, 128, 8, 3, fp8=True, tma=True),
        Tile(128, 128, 8, 2, fp8=True, tma=True),
        Tile(128, 64, 8, 3, fp8=True, tma=True),
        Tile(64, 128, 4, 2, fp8=True, tma=True),
    ),
    (256, False): (Tile(64, 128, 8, 2, fp8=True, tma=True), Tile(64, 64, 8, 2, fp8=True, tma=True)),
    (64, True): (Tile(128, 64, 8, 2, fp8=True, tma=True), Tile(64, 128, 4, 2, fp8=True, tma=True)),
    (128, True): (Tile(128, 64, 8, 2, fp8=True, tma=True), Tile(64, 64, 4, 2, fp8=True, tma=True)),
    (256, True): (Tile(64, 128, 8, 2, fp8=True, tma=True), Tile(64, 64, 8, 2, fp8=True, tma=True)),
}
_BLACKWELL: Table = {
    (64, False): (Tile(128, 128, 8, 2, fp8=True), Tile(128, 64, 8, 2, fp8=True), Tile(128, 32, 4, 2, fp8=True)),
    (128, False): (Tile(128, 64, 8, 2, fp8=True), Tile(64, 64, 4, 2, fp8=True)),
    (256, False): (Tile(64, 64, 8, 2, fp8=True), Tile(64, 32, 8, 2, fp8=True)),
    # In fp16, which takes as many instructions: e4m3 with a mask has been seen not to compile.
    (64, True): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2, fp8=True)),
    (128, True): (Tile(128, 32, 8, 2), Tile(128, 64, 8, 2, fp8=True)),
    (256, True): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2, fp8=True)),
}
# From this compute capability on. Blackwell's consumer GPUs have Ada's matrix instructions.
INT8: tuple[tuple[Capability, Table], ...] = (
    ((12, 0), _ADA),
    ((10, 0), _BLACKWELL),
    ((9, 0), _HOPPER),
    ((8, 9), _ADA),
    ((8, 0), _AMPERE),
)

# The same for short calls.
_SHORT: Table = {
    **{key: tiles[:1] for key, tiles in _AMPERE.items()},
    (256, True): (Tile(32, 32, 4, 2),),  # 32×64 goes to local memory on sm_120
}
_SHORT_HOPPER: Table = {
    (64, False): (Tile(128, 128, 8, 2, tma=True),),
    (128, False): (Tile(128, 64, 8, 2, tma=True),),
    (256, False): (Tile(64, 64, 8, 2, tma=True),),
    (64, True): (Tile(128, 64, 8, 2, tma=True),),
    (128, True): (Tile(128, 64, 8, 2, tma=True),),
    (256, True): (Tile(64, 64, 8, 2, tma=True),),
}
_SHORT_BLACKWELL: Table = {
    (64, False): (Tile(128, 64, 8, 2),),
    (128, False): (Tile(128, 64, 8, 2),),
    (256, False): (Tile(64, 32, 8, 2),),
    (64, True): (Tile(128, 64, 8, 2),),
    (128, True): (Tile(128, 64, 8, 2),),
    (256, True): (Tile(64, 32, 8, 2),),
}
SHORT: tuple[tuple[Capability, Table], ...] = (
    ((12, 0), _SHORT),
    ((10, 0), _SHORT_BLACKWELL),
    ((9, 0), _SHORT_HOPPER),
    ((8, 0), _SHORT),
)

# attune_bf16. `tma` holds where the tensors' strides allow it.
_EXACT_SYNC: Table = {
    (64, False): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    (128, False): (Tile(128, 32, 8, 2), Tile(32, 64, 4, 2)),
    (256, False): (Tile(32, 32, 8, 2),),
    (64, True): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    (128, True): (Tile(128, 32, 8, 2), Tile(32, 64, 4, 2)),
    (256, True): (Tile(32, 32, 8, 2),),
}
# One number of 128×32 with a mask goes to local memory there.
_EXACT_RTX: Table = {**_EXACT_SYNC, (128, True): (Tile(128, 16, 8, 2), Tile(32, 64, 4, 2))}
_EXACT_HOPPER: Table = {
    (64, False): (Tile(128, 128, 8, 2, tma=True), Tile(64, 128, 4, 2, tma=True)),
    (128, False): (Tile(128, 64, 8, 3, tma=True), Tile(128, 64, 8, 2, tma=True), Tile(64, 64, 4, 2, tma=True)),
    (256, False): (Tile(128, 32, 8, 2, tma=True), Tile(64, 32, 4, 2, tma=True)),
    (64, True): (Tile(128, 64, 8, 2, tma=True), Tile(64, 64, 4, 2, tma=True)),
    (128, True): (Tile(128, 64, 8, 2, tma=True), Tile(64, 64, 4, 2, tma=True)),
    (256, True): (Tile(64, 32, 4, 2, tma=True), Tile(128, 32, 8, 2, tma=True)),
}
_EXACT_BLACKWELL: Table = {
    (64, False): (Tile(128, 64, 8, 2, tma=True), Tile(128, 64, 8, 3, tma=True)),
    (128, False): (Tile(128, 64, 8, 2, tma=True), Tile(128, 64, 8, 3, tma=True)),
    (256, False): (Tile(128, 32, 8, 2, tma=True),),
    (64, True): (Tile(128, 64, 8, 2, tma=True), Tile(128, 32, 8, 2, tma=True)),
    (128, True): (Tile(128, 32, 8, 2, tma=True), Tile(128, 64, 8, 2, tma=True)),
    (256, True): (Tile(64, 64, 8, 2, tma=True), Tile(64, 32, 4, 2, tma=True)),
}
EXACT: tuple[tuple[Capability, Table], ...] = (
    ((12, 0), _EXACT_RTX),
    ((10, 0), _EXACT_BLACKWELL),
    ((9, 0), _EXACT_HOPPER),
    ((8, 0), _EXACT_SYNC),
)
INTERPRETER = Tile(64, 64, 4, 2, fp8=True)  # on a CPU


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How the keys of a head are dealt out: `chunks` of `chunk` tokens, in buffers of `padded` tokens."""

    padded: int
    chunk: int
    chunks: int


def width_of(dim: int) -> int:
    """What a head dimension is padded to."""
    return next(width for width in WIDTHS if dim <= width)


def at_once(width: int) -> int:
    """How many tokens are rounded at a time."""
    return 32 if width > 128 else 64


@functools.lru_cache(maxsize=256)
def chunk_plan(kv_len: int) -> ChunkPlan:
    blocks = max(1, -(-kv_len // TOKENS))  # no keys at all are a block of hidden ones
    per_chunk = -(-blocks // CHUNKS)
    return ChunkPlan(blocks * TOKENS, per_chunk * TOKENS, -(-blocks // per_chunk))


def candidates_for(
    tables: tuple[tuple[Capability, Table], ...], capability: Capability | None, dim: int, masked: bool
) -> tuple[Tile, ...]:
    """The tiles of INT8, SHORT or EXACT worth measuring on a GPU of this compute capability, the shipped one first.

    None is a CPU, with Triton's interpreter.
    """
    if capability is None:
        return (INTERPRETER,)
    table = next(table for least, table in tables if capability >= least)
    return table[width_of(dim), masked]


def tile_for(
    tables: tuple[tuple[Capability, Table], ...], capability: Capability | None, dim: int, masked: bool
) -> Tile:
    """The tile that is taken where none has been measured: the first of `candidates_for`."""
    return candidates_for(tables, capability, dim, masked)[0]
