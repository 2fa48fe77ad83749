"""Which of the shipped tiles is the fastest on this very GPU: measured once, after the kernel's proof in its child.

tiles.py has the candidates. What was chosen is kept with the kernel's verdict, and `use` makes later calls take it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch

from ...attention.errors import measure_errors
from .._common import capability_of
from .tiles import EXACT, INT8, SHORT, Tile, candidates_for, width_of

TABLES = {"attune_int8": INT8, "attune_bf16": EXACT}
_WIDTHS = (64, 128)  # without a mask: what video and image models ask for
_SHAPE = (1, 8192, 16)  # batch, tokens, heads: enough programs for every GPU, 1 ms of an H200, 0.3 GB
_ROUNDS = 9
_GAIN = 0.98  # of the shipped tile's time; what gains less may be noise
_chosen: dict[tuple[int, str, int], Tile] = {}  # (GPU, kernel, width) → tile

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Tile], torch.Tensor]


@functools.lru_cache(maxsize=64)
def tile_on(kernel: str, index: int, dim: int, masked: bool, short: bool = False) -> Tile:
    """The tile for calls on the GPU `index` (-1: a CPU, with Triton's interpreter). short: at most SHORT_KEYS keys."""
    shipped = candidates_for(SHORT if short else TABLES[kernel], capability_of(index), dim, masked)[0]
    return shipped if masked or short else _chosen.get((index, kernel, width_of(dim)), shipped)


def use(kernel: str, device: str, choice: Mapping[str, str]) -> None:
    """Take what `refine` has found on an equal GPU. Tiles that are not shipped (any more) are passed over."""
    index = torch.device(device).index
    for width in _WIDTHS:
        tiles = candidates_for(TABLES[kernel], capability_of(index), width, False) if index is not None else ()
        for tile in tiles:
            if str(tile) == choice.get(str(width)):
                _chosen[index, kernel, width] = tile
    tile_on.cache_clear()


def refine(
    kernel: str,
    device: str,
    allowed: float,
    say: Callable[[str], None],
    attend: Attend | None = None,
    milliseconds: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, str]:
    """The fastest tile for each width, by name; without the widths that have one only.

    allowed: relative L2 by which outputs may differ from the shipped tile's; one that differs more, or fails, is out.
    say: told before each step. attend, milliseconds: how it is run and timed, if not by the kernel on the GPU.
    """
    attend, milliseconds = attend or _attend(kernel), milliseconds or _milliseconds(device)
    found = {}
    for width in _WIDTHS:
        tiles = candidates_for(TABLES[kernel], capability_of(torch.device(device).index), width, False)
        if len(tiles) > 1:
            found[str(width)] = str(_fastest(tiles, width, device, allowed, say, attend, milliseconds))
    return found


def _fastest(
    tiles: tuple[Tile, ...],
    width: int,
    device: str,
    allowed: float,
    say: Callable[[str], None],
    attend: Attend,
    milliseconds: Callable[[Callable[[], object]], float],
) -> Tile:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(*_SHAPE, width, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3))
    say(f"tile {tiles[0]}, {width} channels")
    wanted = attend(q, k, v, tiles[0])
    times: dict[Tile, list[float]] = {tiles[0]: []}
    for tile in tiles[1:]:
        say(f"tile {tile}, {width} channels")
        try:
            # Two heads: in float64 all of them would take half a gigabyte.
            if measure_errors(attend(q, k, v, tile)[:, :, :2], wanted[:, :, :2]).l2 <= allowed:
                times[tile] = []
        except torch.cuda.OutOfMemoryError:
            raise  # it says nothing about the tile
        except Exception:  # it does not compile or does not fit here: there are others
            continue
    for _ in range(_ROUNDS):  # in turns, so that a GPU that changes its clock does so for all of them
        for tile, each in times.items():
            each.append(milliseconds(functools.partial(attend, q, k, v, tile)))
    least = {tile: min(each) for tile, each in times.items()}  # whatever shares the GPU only ever adds
    best = min(least, key=lambda tile: least[tile])
    return best if least[best] < _GAIN * least[tiles[0]] else tiles[0]


def _attend(kernel: str) -> Attend:
    from . import launch

    function = {"attune_int8": launch.int8_attention, "attune_bf16": launch.exact_attention}[kernel]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile) -> torch.Tensor:
        if not q.is_cuda:
            return function(q, k, v, tile=tile)
        with torch.cuda.device(q.device):  # Triton launches on the current GPU
            return function(q, k, v, tile=tile)

    return attend


def _milliseconds(device: str) -> Callable[[Callable[[], object]], float]:
    if torch.device(device).type != "cuda":
        return _on_cpu

    def timed(call: Callable[[], object]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            began.record()
            call()
            ended.record()
            ended.synchronize()
        return float(began.elapsed_time(ended))

    return timed


def _on_cpu(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3
