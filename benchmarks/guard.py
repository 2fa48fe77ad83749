"""What it costs to watch a healthy run: every attention output checked, and lossy calls compared with float32.

    python benchmarks/guard.py [--device cpu] [--forwards 40] [--rounds 5] [--json FILE]

A small stack of transformer blocks stands for a model: projections, attention, MLP. The kernel is PyTorch's own under
two names: one that is exact and not plain PyTorch (outputs are checked), one that is lossy (calls are also compared
with float32). On CUDA guarded and plain forwards alternate and the overhead is their difference; on a CPU, whose noise
is larger than that, it is the process's own time inside the guard, on one thread. A run is `forwards` forwards, of
which the first compares every call, the later ones a call now and then.
Memory: the peak of the guarded forward that compares every call, over the plain one's.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from support.loading import load_package  # noqa: E402

# tokens, heads, head dimension, blocks, what it is like
SHAPES = {
    "cpu": [(1024, 8, 64, 6, "small"), (2048, 8, 64, 6, "larger")],
    "cuda": [
        (4096, 10, 64, 16, "SDXL at 1024 x 1024, first level"),
        (4608, 24, 128, 8, "Flux at 1024 x 1024"),
        (32760, 40, 128, 4, "Wan 14B, 480p, 81 frames"),
        (75600, 40, 128, 2, "Wan 14B, 720p, 81 frames"),
    ],
}


class Block(torch.nn.Module):
    def __init__(self, index: int, heads: int, dim: int, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        width = heads * dim
        self.index, self.heads, self.attend = index, heads, attend
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.contiguous() for part in self.qkv(torch.nn.functional.layer_norm(x, x.shape[-1:])).chunk(3, -1))
        options = {"block_index": self.index, "total_blocks": 99}
        x = x + self.out(self.attend(host, q, k, v, self.heads, transformer_options=options))
        return x + self.down(torch.nn.functional.gelu(self.up(torch.nn.functional.layer_norm(x, x.shape[-1:]))))


def peak_on_cpu(call: Callable[[], None]) -> int:
    """The most bytes that tensors took at a time beyond what there was before, by the profiler's account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text("utf-8"))["traceEvents"]
    steps = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = most = 0
    for _, size in steps:
        held += size
        most = max(most, held)
    return most


def host(*_args: Any, **_options: Any) -> torch.Tensor:
    raise AssertionError("the kernel was not used")


def measure(
    shape: tuple[int, int, int, int, str], lossy: bool, device: str, forwards: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of a plain forward, what guarding adds to a usual and to the first one, and to a run in percent."""
    from dataclasses import replace

    from comfyui_attune.attention import healing
    from comfyui_attune.attention.healing import Snapshot, healed
    from comfyui_attune.attention.machine import read_machine
    from comfyui_attune.attention.policy import Policy, Rule
    from comfyui_attune.attention.router import Router
    from comfyui_attune.attention.session import Forward, Session
    from comfyui_attune.kernels import KERNELS

    tokens, heads, dim, blocks, like = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sdpa = next(kernel for kernel in KERNELS if kernel.name == "sdpa")
    name = "sage2_fp8_cuda" if lossy else "flash2"
    kernel = replace(
        sdpa, name=name, needs_proof=True, precision="lossy" if lossy else "exact", tolerance={dtype: 0.07}
    )
    router = Router(Policy((Rule((name,)),)), {name: kernel}, read_machine(gpus=device != "cpu"))
    model = torch.nn.Sequential(*(Block(index, heads, dim, router) for index in range(blocks))).to(device, dtype)
    x = torch.randn(1, tokens, heads * dim, device=device, dtype=dtype)
    session, active = Session(router), router.policy.without_percent
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    # On a CPU the process's own time on one thread: what else the machine does hardly enters.
    clock = time.perf_counter if device != "cpu" else time.process_time

    def plain() -> None:
        with Forward(router, session, active):
            model(x)

    def guarded(one: Session) -> None:
        healed(router, one, active, True, lambda: model(x), Snapshot())

    def timed(call: Callable[[], None]) -> float:
        wait()
        start = clock()
        call()
        wait()
        return 1000 * (clock() - start)

    def peak(call: Callable[[], None]) -> int:
        if device == "cpu":
            return peak_on_cpu(call)
        torch.cuda.reset_peak_memory_stats()
        call()
        wait()
        return torch.cuda.max_memory_allocated()

    def added(one: Session, plain_ms: float) -> float:
        """Milliseconds that guarding adds to one forward: on a CPU those in the guard itself, see above."""
        if device != "cpu":
            return timed(lambda: guarded(one)) - plain_ms
        spent = 0.0

        class Timed(healing.Watch):
            def see(self, *args: Any) -> None:
                nonlocal spent
                start = clock()
                super().see(*args)
                spent += clock() - start

            def read(self, *args: Any) -> Any:
                nonlocal spent
                start = clock()
                health = super().read(*args)
                spent += clock() - start
                return health

        real, healing.Watch = healing.Watch, Timed
        try:
            guarded(one)
        finally:
            healing.Watch = real
        return 1000 * spent

    def beside() -> float:
        return timed(plain) if device != "cpu" else 0.0  # a CPU needs no pairs, see above

    with torch.no_grad():
        plain()
        guarded(session)
        memory = peak(lambda: guarded(Session(router))) - peak(plain)
        first, usual, base = [], [], []
        for _ in range(rounds):
            fresh = Session(router)
            base.append(statistics.median(timed(plain) for _ in range(3)))
            first.append(added(fresh, base[-1]))
            usual.append(statistics.mean(added(session, beside()) for _ in range(max(4, forwards // rounds))))
    assert session.record.observed()[name], "nothing was measured"
    plain_ms, usual_ms, first_ms = map(statistics.median, (base, usual, first))
    share = (first_ms + (forwards - 1) * usual_ms) / (forwards * plain_ms)
    return {
        "like": like,
        "tokens": tokens,
        "heads": heads,
        "head_dim": dim,
        "blocks": blocks,
        "kernel": "lossy" if lossy else "exact",
        "forward_ms": round(plain_ms, 3),
        "added_ms": round(usual_ms, 3),
        "added_to_first_ms": round(first_ms, 3),
        "added_to_run_percent": round(100 * share, 2),
        "added_peak_bytes": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What watching a healthy run costs.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--forwards", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load_package("comfyui_attune", ROOT)
    gc.disable()
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for shape in SHAPES[options.device]:
        for lossy in (False, True):
            rows.append(measure(shape, lossy, options.device, options.forwards, options.rounds))
            print(json.dumps(rows[-1]), flush=True)
            gc.collect()
    result = {
        "benchmark": "guard",
        "machine": {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "forwards": options.forwards,
        "rounds": options.rounds,
        "results": rows,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
