"""How big the tiles are, per architecture: data, and the sizes of buffers that follow from a call.

The tiles are those without local memory in the loop and with the fewest instructions per score, by the static reports
(benchmarks/static/, docs/int8-log.md there). None has been timed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

TOKENS = 128  # lengths of buffers and chunks are multiples of it; every BN divides it
CHUNKS = 64  # at most so many programs for the keys of a head; they leave statistics that are added up in one go
WIDTHS = (64, 128, 256)  # what head dimensions are padded to, in the kernels' own buffers and registers
Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """BM queries and BN keys a turn, warps, stages of the pipeline; fp8 or fp16 for PV; TMA or pointers for K and V."""

    bm: int
    bn: int
    warps: int
    stages: int
    fp8: bool
    tma: bool = False
    rotate: bool = True


_AMPERE = {
    (64, False): Tile(128, 64, 8, 2, fp8=False),
    (128, False): Tile(128, 64, 8, 2, fp8=False),
    (256, False): Tile(32, 64, 4, 2, fp8=False),
    (64, True): Tile(128, 64, 8, 2, fp8=False),
    (128, True): Tile(64, 64, 8, 2, fp8=False),
    (256, True): Tile(32, 32, 4, 2, fp8=False),
}
_ADA = {
    (64, False): Tile(128, 64, 8, 2, fp8=True),
    (128, False): Tile(128, 64, 8, 2, fp8=True),
    (256, False): Tile(32, 64, 4, 2, fp8=True),
    (64, True): Tile(128, 64, 8, 2, fp8=True),
    (128, True): Tile(64, 64, 8, 2, fp8=True),
    (256, True): Tile(32, 32, 4, 2, fp8=True),
}
_HOPPER = {
    (64, False): Tile(128, 128, 8, 2, fp8=True, tma=True),
    (128, False): Tile(128, 128, 8, 2, fp8=True, tma=True),
    (256, False): Tile(64, 64, 8, 2, fp8=True, tma=True),
    (64, True): Tile(128, 64, 8, 2, fp8=True, tma=True),
    (128, True): Tile(128, 64, 8, 2, fp8=True, tma=True),
    (256, True): Tile(64, 64, 8, 2, fp8=True, tma=True),
}
_BLACKWELL = {
    (64, False): Tile(128, 64, 8, 2, fp8=True),
    (128, False): Tile(128, 64, 8, 2, fp8=True),
    (256, False): Tile(64, 32, 8, 2, fp8=True),
    # Triton 3.6 fails to compile e4m3 with a mask for sm_100.
    (64, True): Tile(128, 64, 8, 2, fp8=False),
    (128, True): Tile(128, 32, 8, 2, fp8=False),
    (256, True): Tile(64, 32, 8, 2, fp8=False),
}
# From this compute capability on; (width, with a mask) → tile. Blackwell's consumer GPUs are made like Ada.
TILES: tuple[tuple[Capability, dict[tuple[int, bool], Tile]], ...] = (
    ((12, 0), _ADA),
    ((10, 0), _BLACKWELL),
    ((9, 0), _HOPPER),
    ((8, 9), _ADA),
    ((8, 0), _AMPERE),
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
    blocks = -(-kv_len // TOKENS)
    per_chunk = -(-blocks // CHUNKS)
    return ChunkPlan(blocks * TOKENS, per_chunk * TOKENS, -(-blocks // per_chunk))


def tile_for(capability: Capability | None, dim: int, masked: bool) -> Tile:
    """The tile for a GPU of this compute capability; None is a CPU with the interpreter."""
    if capability is None:
        return INTERPRETER
    table = next(table for least, table in TILES if capability >= least)
    return table[width_of(dim), masked]
