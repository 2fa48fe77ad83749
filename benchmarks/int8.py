"""How fast attune_int8 and attune_bf16 are beside the other kernels on this machine. Needs an NVIDIA GPU.

    python benchmarks/int8.py [--rounds 5] [--seconds 1] [--shapes wan-32760 ...] [--tiles] [--json FILE]

Every kernel that can run a shape is timed in each round, one after the other, so that what the GPU does meanwhile
(heat, clocks) hits all of them; a figure is the median of the rounds' medians. Quantisation is part of a call. TOPS
counts 4·B·H·N·M·D operations. Also told: how long the first call took (compiling), what a call costs the CPU, and the
aims of the project beside what was found. With --tiles, attune_int8 is timed with other tiles than the shipped one:
write what is better into kernels/int8/tiles.py, and what you saw into int8-log.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# Batch, heads, queries, keys, head dimension: Wan 2.2 14B (480p, 720p, 81 frames), Flux, SDXL (docs/benchmarks.md).
SHAPES = {
    "wan-75600": (1, 40, 75_600, 75_600, 128),
    "wan-32760": (1, 40, 32_760, 32_760, 128),
    "wan-cross": (1, 40, 75_600, 512, 128),
    "flux-4608": (1, 24, 4608, 4608, 128),
    "sdxl-4096": (2, 10, 4096, 4096, 64),
}
# On an H200: the least, the goal, and what would be better still.
TOPS = (880, 1050, 1200)
AIMS = {  # times as fast as
    "best sdpa": (1.35, 1.6, 1.85),
    "kitchen_int8": (1.4, 1.6, 2.0),
    "sage1": (1.6, 1.9, 2.2),
}
TILES = [
    {"bm": bm, "bn": bn, "warps": warps, "stages": stages, "tma": tma}
    for (bm, warps), bn, stages, tma in itertools.product(((128, 8), (64, 4)), (64, 128), (2, 3, 4), (False, True))
]


def load_pack() -> None:
    """Import this checkout as `comfyui_attune` without putting it on `sys.path`."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_attune", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec and spec.loader
    sys.modules["comfyui_attune"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["comfyui_attune"])


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v as (B, H, tokens, D) that lie in memory as (B, tokens, H, D), as in most models."""
    batch, heads, q_len, kv_len, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(batch, length, heads, dim, dtype=dtype, device="cuda", generator=generator).transpose(1, 2)
        for length in (q_len, kv_len, kv_len)
    ]


def contenders(shape: tuple[int, ...], with_tiles: bool) -> Iterator[tuple[str, Callable[..., torch.Tensor], bool]]:
    """(name, run, does it take (B, tokens, H, D)?) of every kernel that says it can run this shape in bfloat16."""
    from comfyui_attune.attention.call import AttentionCall, Layout
    from comfyui_attune.attention.kernel import reasons_against
    from comfyui_attune.attention.machine import read_machine
    from comfyui_attune.kernels import KERNELS

    machine = read_machine()
    batch, heads, q_len, kv_len, dim = shape
    call = AttentionCall(batch, heads, heads, q_len, kv_len, dim, dim, torch.bfloat16, machine.main_device.name)
    for kernel in KERNELS:
        reasons = reasons_against(kernel, call, machine)
        if reasons or kernel.name in ("sdpa_math", "split"):
            print(f"  {kernel.name}: left out: {'; '.join(reasons) or 'slow by design'}")
            continue
        try:
            yield kernel.name, kernel.load(), kernel.layout is Layout.BNHD
        except Exception as error:
            print(f"  {kernel.name}: cannot be loaded: {type(error).__name__}: {error}")
    if with_tiles:
        from comfyui_attune.kernels.int8.launch import int8_attention
        from comfyui_attune.kernels.int8.tiles import INT8, tile_for

        shipped = tile_for(INT8, torch.cuda.get_device_capability(), dim, False)
        for changes in TILES:
            tile = dataclasses.replace(shipped, **changes)
            way = "TMA" if tile.tma else "pointers"
            name = f"int8 {tile.bm}x{tile.bn}, {tile.warps} warps, {tile.stages} stages, {way}"
            yield name, lambda *qkv, tile=tile: int8_attention(*qkv, tile=tile), True


def cpu_cost(call: Callable[[], Any]) -> float:
    """Microseconds that the host is busy with a call, as long as nothing makes it wait for the GPU."""
    torch.cuda.synchronize()
    costs = []
    for _ in range(20):
        began = time.perf_counter()
        call()
        costs.append((time.perf_counter() - began) * 1e6)
        torch.cuda.synchronize()
    return statistics.median(costs)


def run_shape(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per kernel that ran: name, milliseconds, TOPS, microseconds of CPU, seconds of the first call."""
    from comfyui_attune.measure.timing import Effort, measure

    shape = SHAPES[name]
    qkv = tensors(shape, torch.bfloat16)
    device, effort = torch.device("cuda"), Effort(budget=options.seconds)
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for kernel, run, swap in contenders(shape, options.tiles):
        given = [t.transpose(1, 2) for t in qkv] if swap else qkv
        call = lambda run=run, given=given: run(*given)  # noqa: E731
        began = time.perf_counter()
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:  # a tile that does not fit, for one
            print(f"  {kernel}: failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            continue
        rows[kernel] = {"kernel": kernel, "shape": name, "first_call_s": time.perf_counter() - began}
        calls[kernel] = call
    times: dict[str, list[float]] = {kernel: [] for kernel in calls}
    for _ in range(options.rounds):
        for kernel, call in calls.items():
            times[kernel].append(measure(call, device, effort).median)
    batch, heads, q_len, kv_len, dim = shape
    for kernel, row in rows.items():
        seconds = statistics.median(times[kernel])
        row["ms"], row["rounds_ms"] = seconds * 1e3, [each * 1e3 for each in times[kernel]]
        row["tops"] = 4 * batch * heads * q_len * kv_len * dim / seconds / 1e12
        row["cpu_us"] = cpu_cost(calls[kernel])
    return sorted(rows.values(), key=lambda row: row["ms"])


def aims(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the project asks of attune_int8 on an H200, beside what these rows say."""
    ms = {row["kernel"]: row["ms"] for row in rows}
    ours = ms.get("attune_int8")
    if ours is None:
        return
    tops = next(row["tops"] for row in rows if row["kernel"] == "attune_int8")
    yield f"  attune_int8: {tops:.0f} TOPS (least {TOPS[0]}, goal {TOPS[1]}, stretch {TOPS[2]}, on an H200)"
    ms["best sdpa"] = min((ms[name] for name in ms if name.startswith("sdpa")), default=0.0)
    for other, (least, goal, stretch) in AIMS.items():
        if ms.get(other):
            found = ms[other] / ours
            verdict = "missed" if found < least else "met" if found < goal else "goal met"
            yield f"  {found:.2f} times as fast as {other} (least {least}, goal {goal}, stretch {stretch}): {verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each kernel in each round")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tiles", action="store_true", help="also time attune_int8 with other tiles")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print("Needs an NVIDIA GPU, and torch sees none. Nothing was measured.", file=sys.stderr)
        return 1
    load_pack()
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    machine = {"gpu": torch.cuda.get_device_name(), "capability": capability, "torch": torch.__version__}
    machine |= {"cuda": torch.version.cuda, "python": platform.python_version()}
    print(machine)
    found = []
    for name in options.shapes:
        print(name, "batch {}, {} heads, {} queries, {} keys, head dimension {}".format(*SHAPES[name]))
        rows = run_shape(name, options)
        for row in rows:
            print(
                f"  {row['kernel']:40} {row['ms']:9.3f} ms {row['tops']:7.0f} TOPS, CPU {row['cpu_us']:5.0f} µs, "
                f"first call {row['first_call_s']:5.1f} s"
            )
        if name.startswith("wan-") and name != "wan-cross":
            print(*aims(rows), sep="\n")
        found += rows
    if options.json:
        text = json.dumps({"kind": "attune int8", "machine": machine, "rows": found}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
