"""What routing one attention call costs on top of calling the kernel by hand.

    python benchmarks/dispatch.py [--calls 20000] [--rounds 7] [--json FILE]

The kernel is one that returns a tensor made beforehand, so that only the way to it is timed: A is the router with a
cached plan, B makes the same views and calls the same kernel. Calls of A and B alternate one by one. Each round gives
the medians, the 99th percentiles and their differences in microseconds; printed is the median of the rounds, as the
99th percentile of one round is mostly what else the machine was doing.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from support.loading import load_package  # noqa: E402


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def measure(calls: int, skip_reshape: bool) -> dict[str, float]:
    """Microseconds of a routed call, of the bare call, and the difference, over `calls` pairs."""
    from comfyui_attune.attention.call import Layout
    from comfyui_attune.attention.kernel import Kernel, Needs
    from comfyui_attune.attention.machine import Machine
    from comfyui_attune.attention.policy import Policy, Rule
    from comfyui_attune.attention.router import Router
    from comfyui_attune.attention.session import Forward, Session

    heads, tokens, dim = 8, 64, 64
    shape = (1, heads, tokens, dim) if skip_reshape else (1, tokens, heads * dim)
    q, k, v = (torch.randn(shape) for _ in range(3))
    answer = torch.empty(1, heads, tokens, dim).transpose(1, 2).contiguous().transpose(1, 2)

    def run(q, k, v, *, mask=None, scale=None):
        return answer

    kernel = Kernel(
        name="sdpa",
        title="returns a tensor made beforehand",
        package="",
        layout=Layout.BHND,
        precision="exact",
        tolerance={},
        load=lambda: run,
        needs=Needs(devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32})),
    )
    router = Router(Policy((Rule(("sdpa",)),)), {"sdpa": kernel}, Machine())
    options = {"block_index": 3, "block_type": "double", "total_blocks": 40, "optimized_attention_override": router}

    def host(*_args, **_kwargs):
        raise AssertionError("the kernel was not used")

    def routed() -> torch.Tensor:
        return router(
            host, q, k, v, heads, skip_reshape=skip_reshape, transformer_options=options, _inside_attn_wrapper=True
        )

    def bare() -> torch.Tensor:
        if skip_reshape:
            out = run(q, k, v, mask=None, scale=None)
        else:
            a = q.view(1, tokens, heads, -1).transpose(1, 2)
            b = k.view(1, tokens, heads, -1).transpose(1, 2)
            c = v.view(1, tokens, heads, -1).transpose(1, 2)
            out = run(a, b, c, mask=None, scale=None)
        return out.transpose(1, 2).reshape(1, tokens, -1)

    with Forward(router, Session(router), frozenset({0})):
        for _ in range(1000):
            routed(), bare()
        ours, theirs = [], []
        clock = time.perf_counter_ns
        gc.collect()
        gc.disable()  # as timeit does
        for _ in range(calls):
            start = clock()
            routed()
            middle = clock()
            bare()
            ours.append((middle - start) / 1000)
            theirs.append((clock() - middle) / 1000)
    gc.enable()
    return {
        "routed_median_us": statistics.median(ours),
        "bare_median_us": statistics.median(theirs),
        "routed_p99_us": percentile(ours, 0.99),
        "bare_p99_us": percentile(theirs, 0.99),
        "overhead_median_us": statistics.median(ours) - statistics.median(theirs),
        "overhead_p99_us": percentile(ours, 0.99) - percentile(theirs, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load_package("comfyui_attune", ROOT)
    torch.set_num_threads(1)
    results = {}
    for name, skip_reshape in (("layout (B, N, H*D)", False), ("layout (B, H, N, D)", True)):
        rounds = [measure(options.calls, skip_reshape) for _ in range(options.rounds)]
        results[name] = {figure: round(statistics.median(r[figure] for r in rounds), 3) for figure in rounds[0]}
    report = {
        "benchmark": "dispatch",
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.system()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "calls": options.calls,
        "rounds": options.rounds,
        "results": results,
    }
    for name, row in results.items():
        print(
            f"{name}: routed {row['routed_median_us']:.2f} µs, by hand {row['bare_median_us']:.2f} µs, overhead "
            f"{row['overhead_median_us']:.2f} µs median, {row['overhead_p99_us']:.2f} µs p99"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
