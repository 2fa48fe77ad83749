"""What a call of attune_int8 and attune_bf16 costs the CPU, without a GPU: benchmarks/results/int8-launch-cpu.json.

    python benchmarks/int8_launch.py [--rounds 5] [--calls 2000] [--json FILE]

Kernels are compiled for sm_90 and launched through Triton's own launcher into a libcuda that only writes launches down
(tests/support/no_gpu.py). So everything is counted but the driver's own time, and allocations are the CPU's. Each way
is timed in turns: as the pack launches, and through Triton at each call. Microseconds, the median of calls; the rounds'
spread is in the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def cost(call: Callable[[], object], calls: int) -> float:
    took = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    import torch
    import triton

    from support.loading import load_package
    from support.no_gpu import WHY_NOT, NoGPU

    if WHY_NOT:
        sys.exit(f"Nothing was measured: {WHY_NOT}.")
    load_package("comfyui_attune", ROOT)
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    NoGPU(Path(folder.name), (9, 0))
    from comfyui_attune.kernels.int8 import launch, launched, tiles

    class ThroughTriton(launched.Launch):
        """Looks for the compiled kernel at each call, as `kernel[grid](...)` does."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self._repeats = False

    q, k, v = (torch.zeros(1, 1024, 4, 128, dtype=torch.bfloat16) for _ in range(3))
    ways: dict[str, Callable[[], object]] = {}
    for name, table, function in (
        ("attune_int8", tiles.INT8, launch.int8_attention),
        ("attune_bf16", tiles.EXACT, launch.exact_attention),
    ):
        for way, kind, batch in (("direct", launched.Launch, 1), ("through Triton", ThroughTriton, 2)):
            given = [t.expand(batch, -1, -1, -1) for t in (q, k, v)]  # another kind of call, so another plan
            launch.Launch = kind  # type: ignore[misc]
            tile = tiles.tile_for(table, (9, 0), 128, False)
            call = lambda f=function, given=given, tile=tile: f(*given, tile=tile)  # noqa: E731
            cost(call, 50)
            ways[f"{name}, {way}"] = call
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, call in ways.items():
            rounds[name].append(round(cost(call, options.calls), 2))
    for name, each in rounds.items():
        print(f"{name:28} {statistics.median(each):6.1f} µs ({min(each):.1f} to {max(each):.1f})")
    if options.json:
        processor = platform.processor() or platform.machine()
        found = {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": processor,
            "microseconds": {
                name: {"median": statistics.median(each), "rounds": each} for name, each in rounds.items()
            },
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8", newline="\n")


if __name__ == "__main__":
    main()
