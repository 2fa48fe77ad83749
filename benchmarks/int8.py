"""How fast attune_int8 and attune_bf16 are beside the other kernels on this machine, and which aims they reach.

    python benchmarks/int8.py [--rounds 5] [--seconds 1] [--shapes wan-32760 ...] [--tiles] [--json FILE]
    python benchmarks/int8.py --dry        # every step on a CPU, with small shapes in Triton's interpreter

Needs an NVIDIA GPU, but for --dry, which shows that this program runs; its times say nothing. Every kernel that can
run a shape is timed in each round, one after the other, so that what the GPU does meanwhile (heat, clocks) hits all of
them; a figure is the median of the rounds' medians. Quantisation is part of a call. TOPS counts 4·B·H·N·M·D operations.
Also found: what a call costs the CPU, how many launches it is, what it allocates, whether it waits for the GPU, and how
long the first use takes in a process and a cache of its own. The aims of the project (int8_aims.py) are judged in the
end; what was not measured is said to be that. How exact the kernels are: int8_errors.py --device cuda.

With --tiles, attune_int8 is timed with other tiles than the shipped one: write what is better into
kernels/int8/tiles.py, and what you saw into int8-log.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from int8_aims import DRY, told, verdicts  # noqa: E402

from support.loading import load_package  # noqa: E402

OURS = ("attune_int8", "attune_bf16")
# Batch, heads, queries, keys, head dimension: Wan 2.2 14B (480p, 720p, 81 frames), Flux, SDXL (docs/benchmarks.md).
SHAPES = {
    "wan-75600": (1, 40, 75_600, 75_600, 128),
    "wan-32760": (1, 40, 32_760, 32_760, 128),
    "wan-cross": (1, 40, 75_600, 512, 128),
    "flux-4608": (1, 24, 4608, 4608, 128),
    "sdxl-4096": (2, 10, 4096, 4096, 64),
}
DRY_SHAPES = {name: (batch, 1, -(-n // 500), -(-m // 500), dim) for name, (batch, _, n, m, dim) in SHAPES.items()}
TILES = [
    {"bm": bm, "bn": bn, "warps": warps, "stages": stages, "tma": tma}
    for (bm, warps), bn, stages, tma in itertools.product(((128, 8), (64, 4)), (64, 128), (2, 3, 4), (False, True))
]
# (name, run, does it take (B, tokens, H, D)?, what else is known of it)
Contender = tuple[str, Callable[..., torch.Tensor], bool, dict[str, Any]]


def load_pack(dry: bool) -> None:
    """Import this checkout as `comfyui_attune`."""
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read while Triton is imported
        from support import interpreter

        interpreter._mend()
    load_package("comfyui_attune", ROOT)


def tensors(shape: tuple[int, ...], device: torch.device) -> list[torch.Tensor]:
    """q, k, v as (B, H, tokens, D) that lie in memory as (B, tokens, H, D), as in most models, in bfloat16."""
    batch, heads, q_len, kv_len, dim = shape
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(batch, length, heads, dim, device=device, generator=generator).bfloat16().transpose(1, 2)
        for length in (q_len, kv_len, kv_len)
    ]


def contenders(shape: tuple[int, ...], dry: bool, with_tiles: bool, left_out: dict[str, str]) -> Iterator[Contender]:
    """Every kernel that says it can run this shape in bfloat16; why others do not goes into `left_out`."""
    from comfyui_attune.attention.call import AttentionCall, Layout
    from comfyui_attune.attention.kernel import reasons_against
    from comfyui_attune.attention.machine import read_machine
    from comfyui_attune.kernels import KERNELS

    machine = read_machine()
    batch, heads, q_len, kv_len, dim = shape
    device = "cpu" if dry else machine.main_device.name
    call = AttentionCall(batch, heads, heads, q_len, kv_len, dim, dim, torch.bfloat16, device)
    for kernel in KERNELS:
        reasons = () if dry and kernel.name in OURS else reasons_against(kernel, call, machine)
        if reasons or kernel.name in ("sdpa_math", "split"):
            left_out[kernel.name] = "; ".join(reasons) or "slow by design"
            continue
        try:
            run = kernel.load()
        except Exception as error:
            left_out[kernel.name] = f"cannot be loaded: {type(error).__name__}: {error}"
            continue
        about = {"exact": kernel.exact, "version": machine.packages.get(kernel.package, "")}
        yield kernel.name, run, kernel.layout is Layout.BNHD, about
    if with_tiles:
        from comfyui_attune.kernels.int8.launch import int8_attention
        from comfyui_attune.kernels.int8.tiles import INT8, tile_for

        shipped = tile_for(INT8, None if dry else torch.cuda.get_device_capability(), dim, False)
        for changes in TILES[:1] if dry else TILES:
            tile = dataclasses.replace(shipped, **changes)
            way = "TMA" if tile.tma else "pointers"
            name = f"int8 {tile.bm}x{tile.bn}, {tile.warps} warps, {tile.stages} stages, {way}"
            yield name, lambda *qkv, tile=tile: int8_attention(*qkv, tile=tile), True, {"exact": False, "version": ""}


def cpu_cost(call: Callable[[], Any]) -> float:
    """Microseconds that the host is busy with a call that finds the GPU idle: the median."""
    costs = []
    for _ in range(50):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        costs.append((time.perf_counter() - began) * 1e6)
    return statistics.median(costs)


def waits(call: Callable[[], Any]) -> bool:
    """Does the call make the host wait for the GPU?"""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def launches(call: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type is torch.autograd.DeviceType.CUDA for event in profile.events())


def extra_memory(call: Callable[[], torch.Tensor]) -> int:
    """Bytes of the call's peak beyond its inputs and its output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    return torch.cuda.max_memory_allocated() - before - out.untyped_storage().nbytes()


def quantised_bytes(shape: tuple[int, ...], value_bytes: int) -> int:
    """K in int8 with a scale per token, and V with so many bytes a number."""
    batch, heads, _, kv_len, dim = shape
    return batch * heads * kv_len * (dim + 4 + dim * value_bytes)


def run_shape(name: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row per kernel that ran, the fastest first, and why others did not."""
    from comfyui_attune.measure.timing import Effort, measure, waiter

    shape = (DRY_SHAPES if options.dry else SHAPES)[name]
    device = torch.device("cpu" if options.dry else "cuda")
    effort = Effort(warm=0, least=1, most=1, budget=0.0) if options.dry else Effort(budget=options.seconds)
    qkv, wait = tensors(shape, device), waiter(device)
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for kernel, run, swap, about in contenders(shape, options.dry, options.tiles, left_out):
        given = [t.transpose(1, 2) for t in qkv] if swap else qkv
        call = lambda run=run, given=given: run(*given)  # noqa: E731
        began = time.perf_counter()
        try:
            call()
            wait()
        except Exception as error:  # a tile that does not fit, for one
            left_out[kernel] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        rows[kernel] = {"kernel": kernel, "shape": name, **about, "first_call_s": time.perf_counter() - began}
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
        if options.dry:
            continue
        call = calls[kernel]
        row["cpu_us"] = cpu_cost(call)
        if kernel in OURS:
            value_bytes = 1 if torch.cuda.get_device_capability() >= (8, 9) else 2
            allowed = quantised_bytes(shape, value_bytes) if kernel == "attune_int8" else 0
            row |= {"launches": launches(call), "waits": waits(call), "extra": extra_memory(call), "allowed": allowed}
    return sorted(rows.values(), key=lambda row: row["ms"]), left_out


def first_use(kernel: str, dry: bool) -> float:
    """Seconds from loading a kernel to its first result, in a process that has an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, __file__, "--first-use", kernel, *(["--dry"] if dry else [])]
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        done = subprocess.run(program, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"the first use of {kernel} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.split()[-1])


def use_first(kernel: str, dry: bool) -> None:
    """What the child of `first_use` does."""
    from comfyui_attune.kernels import KERNELS

    device = "cpu" if dry else "cuda"
    qkv = [torch.randn(1, 512 >> 3 * dry, 4, 128, dtype=torch.bfloat16, device=device) for _ in range(3)]
    if not dry:
        torch.cuda.synchronize()
    began = time.perf_counter()
    out = next(each for each in KERNELS if each.name == kernel).load()(*qkv)
    finite = bool(torch.isfinite(out).all())  # which waits for it
    print(f"first use of {kernel}, finite: {finite}, seconds: {time.perf_counter() - began:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each kernel in each round")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tiles", action="store_true", help="also time attune_int8 with other tiles")
    parser.add_argument("--dry", action="store_true", help="small shapes on a CPU: does this program run?")
    parser.add_argument("--first-use", choices=OURS, metavar="KERNEL", help="only tell how long the first call takes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.dry and (not torch.cuda.is_available() or torch.version.hip is not None):
        print("Needs an NVIDIA GPU, and torch sees none. Nothing was measured.", file=sys.stderr)
        return 1
    load_pack(options.dry)
    if options.first_use:
        use_first(options.first_use, options.dry)
        return 0
    machine = {"gpu": DRY, "torch": torch.__version__, "python": platform.python_version()}
    if not options.dry:
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        machine |= {"gpu": torch.cuda.get_device_name(), "capability": capability, "cuda": torch.version.cuda}
    print(machine)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, dict[str, str]] = {}
    for name in options.shapes:
        sizes = (DRY_SHAPES if options.dry else SHAPES)[name]
        print(name, "batch {}, {} heads, {} queries, {} keys, head dimension {}".format(*sizes))
        found, left_out[name] = run_shape(name, options)
        for row in found:
            cpu = f"CPU {row['cpu_us']:5.0f} µs, " if "cpu_us" in row else ""
            print(f"  {row['kernel']:40} {row['ms']:9.3f} ms {row['tops']:7.4g} TOPS, {cpu}", end="")
            print(f"first call {row['first_call_s']:5.1f} s")
        for kernel, reason in left_out[name].items():
            if name == options.shapes[0] or reason != left_out[options.shapes[0]].get(kernel):  # each reason once
                print(f"  {kernel}: left out: {reason}")
        rows += found
    first: dict[str, float | str] = {}
    for kernel in OURS:
        try:
            first[kernel] = first_use(kernel, options.dry)
        except RuntimeError as error:
            first[kernel] = str(error)
    judged = list(verdicts(rows, left_out, first, machine["gpu"]))
    print("Aims:", *map(told, judged), sep="\n")
    if options.json:
        found = {"kind": "attune int8", "machine": machine, "rows": rows, "left_out": left_out, "verdicts": judged}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
