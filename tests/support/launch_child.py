"""A child of test_int8_launch.py: calls of our Triton kernels on an H200 that is not here. Prints what was launched.

    python launch_child.py FOLDER

Every call is made twice in a row with the same addresses for outputs and buffers: as it comes, and through Triton's own
launch. Prints {case: {"direct": launches, "triton": launches, "kept": kernels that are launched directly, "watched":
launches while somebody profiles, "told": what the profiler was told of in three calls}}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.loading import ROOT, load_package
from support.no_gpu import NoGPU


class SameRoom:
    """torch, but `empty` of one size always gives the same memory."""

    def __init__(self) -> None:
        self._rooms: dict[Any, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key = shape if isinstance(shape, int) else tuple(shape), dtype
        if key not in self._rooms:
            self._rooms[key] = torch.zeros(shape, dtype=dtype, device=device)
        return self._rooms[key]


@contextlib.contextmanager
def profiled() -> Iterator[list[Any]]:
    """A list to which Triton's hook for profilers adds something at each launch."""
    from triton import knobs

    told: list[Any] = []
    knobs.runtime.launch_enter_hook.add(told.append)
    try:
        yield told
    finally:
        knobs.runtime.launch_enter_hook.remove(told.append)


def main() -> None:
    load_package("comfyui_attune", ROOT)
    gpu = NoGPU(Path(sys.argv[1]), (9, 0))
    from comfyui_attune.kernels.int8 import launch, launched, tiles

    launch.torch = SameRoom()
    tables = {"int8": (tiles.INT8, launch.int8_attention), "exact": (tiles.EXACT, launch.exact_attention)}
    made: list[launched.Launch] = []

    class Watched(launched.Launch):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    class ThroughTriton(launched.Launch):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._repeats = False

    def calls(
        kernel: str, kind: type, repeats: int, *qkv: torch.Tensor, fresh: bool = True, **options: Any
    ) -> list[Any]:
        table, function = tables[kernel]
        tile = tiles.tile_for(table, (9, 0), qkv[0].shape[3], options.get("mask") is not None)
        if fresh:
            launch._int8.cache_clear()
            launch._exact.cache_clear()
        launch.Launch = kind
        gpu.launches()
        for _ in range(repeats):
            gpu.launches()
            function(*qkv, tile=tile, **options)
        return [(*each[:4], each.parameters.hex(), each.function) for each in gpu.launches()]

    def qkv(tokens: int, offset: int = 0) -> list[torch.Tensor]:
        size = tokens * 2 * 64
        rooms = (torch.zeros(size + 8, dtype=torch.bfloat16) for _ in range(3))
        return [room[offset:][:size].view(1, tokens, 2, 64) for room in rooms]

    mask = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    cases: dict[str, tuple[str, list[torch.Tensor], dict[str, Any]]] = {
        "int8": ("int8", qkv(256), {}),
        "exact": ("exact", qkv(256), {"scale": -0.25}),
        "another length": ("exact", qkv(384), {}),
        "a mask": ("exact", qkv(256), {"mask": mask}),
        "not aligned": ("exact", qkv(256, offset=1), {}),
    }
    found = {}
    for name, (kernel, tensors, options) in cases.items():
        made.clear()
        direct = calls(kernel, Watched, 3, *tensors, **options)
        kept = sum(each._run is not None for each in made)
        with profiled() as told:
            watched = calls(kernel, Watched, 3, *tensors, **options)
        triton = calls(kernel, ThroughTriton, 1, *tensors, **options)
        found[name] = {"direct": direct, "watched": watched, "triton": triton, "kept": kept, "told": len(told)}
    # A call that differs in one thing from one that is kept.
    halves = [tensor.half() for tensor in qkv(256)]
    spread = torch.zeros(1, 256, 4, 64, dtype=torch.bfloat16)[:, :, ::2]
    room = torch.zeros(256 * 256 + 16)
    floats = room[:65536].view(1, 1, 256, 256)
    plain, twins = qkv(256), {}
    for name, first, second, masks in (
        ("types", plain, halves, (None, None)),
        ("strides of v", plain, [*plain[:2], spread], (None, None)),
        ("type of the mask", plain, plain, (floats.bfloat16(), floats)),
        ("address of the mask", plain, plain, (floats, room[1:][:65536].view(1, 1, 256, 256))),
    ):
        for kernel in tables:
            made.clear()
            calls(kernel, Watched, 3, *first, mask=masks[0])
            direct = calls(kernel, Watched, 3, *second, mask=masks[1], fresh=False)
            triton = calls(kernel, ThroughTriton, 1, *second, mask=masks[1])
            twins[f"{name}, {kernel}"] = {"direct": direct, "triton": triton}
    json.dump({"cases": found, "twins": twins}, sys.stdout)


if __name__ == "__main__":
    main()
