"""A model of Wan 2.2 14B's size with random weights, sampled by ComfyUI on each kernel: time, memory, error, overhead.

    python benchmarks/real_size.py --size 480p [--kernels host,auto,sdpa] [--compile host,sdpa] [--json FILE]
    python benchmarks/real_size.py --dry     # every step on a CPU, with a tiny model: does this program run?

Needs an NVIDIA GPU with 80 GB and 64 GB of main memory, but for --dry, whose times say nothing. 40 blocks of 40 heads
of 128, bfloat16, one conditioning, euler. ComfyUI: COMFYUI_PATH, or what `python3 dev.py test` has downloaded. Kernels
are proved first, as in ComfyUI. Each samples `--steps` steps from the same noise, `auto` and `auto_fast` again until
nothing is left to measure. A row has
  seconds_per_step   the median of the steps but the first, each waited for; over_host: that over the time of `host`, so
                     that of `host, routed` is what routing costs, and that of `host, again` what the machine drifts
  first_step_s       with what comes before it: loading, and under torch.compile compiling
  guard_ms           on the device, in the guard: of the first forward, which compares every call, and of a later one
  peak_gib           the most that torch had allocated, the model's 27 GiB with it; of `auto` also that of rows before
  error              relative L2 of the first forward's output against that of --exact; latent_error: of the result,
                     against that of `host`
  observed           calls by the kernel that ran them, of forwards that counted; where none ran on the kernel asked for
                     there are no figures. repeated: forwards that the guard had done again
--compile: the kernels again under torch.compile, with a full graph: graphs is to be 1 and graph_breaks 0.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from wan_model import import_comfy, random_wan

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from support.loading import load_package  # noqa: E402

SIZES = {"480p": (832, 480, 81), "720p": (1280, 720, 81)}  # width, height, frames: 32,760 and 75,600 tokens
MODEL = {"blocks": 40, "dim": 5120, "ffn_dim": 13_824, "text_dim": 4096}
DRY_SIZE, DRY_MODEL = (64, 64, 5), {"blocks": 2, "dim": 256, "ffn_dim": 512, "text_dim": 64}
DRY = "no GPU, a dry run"
KERNELS = "host,auto,auto_fast,sdpa,sdpa_cudnn,attune_int8"
ROUTED = "host, routed"
AUTO_RUNS = 8
AUTO_SECONDS = 60.0  # of measuring, as if hours had been sampled: one percent of these runs is too little for one call


def mark() -> Any:
    """A moment: an event on the GPU's queue, where there is one, else the host's clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin: Any, end: Any) -> float:
    return 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


class Sampling:
    """The sampling runs of one model at one size, all from the same noise and text."""

    def __init__(self, model: Any, size: tuple[int, int, int], text_dim: int) -> None:
        width, height, frames = size
        random = torch.Generator().manual_seed(0)
        self.model = model
        self.latent = torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        self.noise = torch.randn(self.latent.shape, generator=random)
        self.text = [[torch.randn(1, 512, text_dim, generator=random), {}]]

    def run(self, patched: Any, steps: int, fresh_peak: bool = True) -> dict[str, Any]:
        """What one run took and gave. `fresh_peak` False: the peak is that of this run and of those before it."""
        import comfy.sample

        from comfyui_attune.attention import healing

        watches: list[list[tuple[Any, Any]]] = []
        ends: list[float] = []
        first: list[torch.Tensor] = []

        class Timed(healing.Watch):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                watches.append([])

            def see(self, *args: Any) -> Any:
                begin = mark()
                found = super().see(*args)
                watches[-1].append((begin, mark()))
                return found

        def step_ended(step: int, denoised: torch.Tensor, x: torch.Tensor, _steps: int) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            if step == 0:
                first.append((x - denoised).float().cpu())  # what the network gave, but for a factor

        if torch.cuda.is_available() and fresh_peak:
            torch.cuda.reset_peak_memory_stats()
        real, healing.Watch = healing.Watch, Timed
        began = time.perf_counter()
        try:
            latent = comfy.sample.sample(
                patched, self.noise, steps, 1.0, "euler", "simple", self.text, self.text, self.latent,
                callback=step_ended, disable_pbar=True, seed=1,
            )  # fmt: skip
        finally:
            healing.Watch = real
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        guard = [sum(milliseconds(*each) for each in spans) for spans in watches]
        times = [after - before for before, after in itertools.pairwise(ends)]
        return {
            "seconds_per_step": statistics.median(times) if times else None,
            "first_step_s": ends[0] - began,
            "guard_ms": [round(guard[0], 3), round(statistics.median(guard[1:]), 3)] if len(guard) > 1 else None,
            "peak_gib": peak,
            "first": first[0],
            "latent": latent.float().cpu(),
        }


def compiled(patched: Any, dry: bool) -> Any:
    """`patched` under torch.compile, as ComfyUI's node TorchCompileModel has it, and with a full graph."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def keep(guards: Any) -> list[bool]:
        return ["transformer_options" not in guard.name for guard in guards]

    clone = patched.clone()
    how: dict[str, Any] = {"backend": "eager"} if dry else {"backend": "inductor", "options": {"guard_filter_fn": keep}}
    set_torch_compile_wrapper(model=clone, fullgraph=True, **how)
    return clone


def account(name: str) -> tuple[dict[str, Any], bool]:
    """What the pack's record says of the last run: fields of its row, and whether `name` ran at all."""
    from comfyui_attune.attention.policy import FAMILIES
    from comfyui_attune.host.runs import RUNS

    if name == "host":
        return {}, True
    record = RUNS.all()[-1].record
    observed, node = dict(record.observed()), record.nodes()["1"]
    refused = list(dict.fromkeys(f"{kernel}: {'; '.join(reasons)}" for kernel, reasons in node.refused))
    fields = {"observed": observed, "repeated": record.repeated, "refused": refused, "notes": record.notes}
    fields["measuring_s"] = record.measuring
    wanted = {"host"} if name == ROUTED else {name, *FAMILIES.get(name, ())}
    return fields, name.startswith("auto") or bool(wanted & observed.keys())


class Table:
    """The rows of this program, each printed and saved at once: a time limit may end the next run."""

    def __init__(self, sampling: Sampling, steps: int, exact: torch.Tensor, save: Callable[[list[Any]], None]) -> None:
        self.sampling, self.steps, self.exact, self.save = sampling, steps, exact, save
        self.rows: list[dict[str, Any]] = []
        self.host: dict[str, Any] = {}  # what the run of `host` found, where it did not fail

    def add(self, title: str, kernel: str, patched: Any, fresh_peak: bool = True) -> dict[str, Any]:
        """Sample `patched`, which asks for `kernel`. What it raises is the reason in its row."""
        counters = torch._dynamo.utils.counters
        torch._dynamo.reset()
        counters.clear()
        row: dict[str, Any] = {"kernel": title}
        try:
            found = self.sampling.run(patched, self.steps, fresh_peak)
        except Exception as error:
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:500]}"}
        else:
            if title == "host":
                self.host = found
            fields, ran = account(kernel)
            row |= {"status": "measured" if ran else "other kernel", **fields, **(self._figures(found) if ran else {})}
        row["graphs"], row["graph_breaks"] = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        self.rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "notes"}), flush=True)
        self.save(self.rows)
        return row

    def _figures(self, found: dict[str, Any]) -> dict[str, Any]:
        from comfyui_attune.attention.errors import measure_errors

        step, base = found["seconds_per_step"], self.host.get("seconds_per_step")
        return {
            **{name: value for name, value in found.items() if name not in ("first", "latent")},
            "over_host": step / base if step and base else None,
            "error": measure_errors(found["first"], self.exact).l2,
            "latent_error": measure_errors(found["latent"], self.host["latent"]).l2 if self.host else None,
        }


def measure(options: argparse.Namespace, sampling: Sampling, save: Callable[[list[Any]], None]) -> None:
    """A row per kernel, and per kernel under torch.compile."""
    from comfyui_attune.attention.policy import Rule
    from comfyui_attune.host import process
    from comfyui_attune.host.comfyui import attach

    def on(name: str) -> Any:
        return sampling.model if name == "host" else attach(sampling.model, Rule((name,), source="1"))

    names = [name for name in options.kernels.split(",") if name != "host"]
    sampling.run(on("host"), 1)  # loads the model
    exact = sampling.run(on(options.exact), 1)["first"]
    fields, ran = account(options.exact)
    if not ran:
        raise SystemExit(f"{options.exact} did not run, choose another --exact. Why: {fields['refused']}")
    table = Table(sampling, options.steps, exact, save)
    table.add("host", "host", on("host"))
    table.add(ROUTED, ROUTED, attach(sampling.model, Rule(("host",), source="1")))
    # `auto` and `auto_fast` first: they measure in the memory below the peak so far, and that of `host` stays.
    for name in sorted(names, key=lambda name: not name.startswith("auto")):
        if not name.startswith("auto"):
            table.add(name, name, on(name))
            continue
        process.MEASURED.timings.allowance = AUTO_SECONDS
        for number in range(AUTO_RUNS):
            if not table.add(f"{name}, run {number + 1}", name, on(name), fresh_peak=False).get("measuring_s"):
                break
    table.add("host, again", "host", on("host"))
    for name in filter(None, options.compile.split(",")):
        table.add(f"{name}, compiled", name, compiled(on(name), options.dry))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="480p", choices=SIZES)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kernels", default=KERNELS)
    parser.add_argument("--compile", default="", metavar="KERNELS", help="also these, under torch.compile")
    parser.add_argument("--exact", default="split", metavar="KERNEL", help="what errors are against: one forward of it")
    parser.add_argument("--dry", action="store_true", help="a tiny model on a CPU: does this program run?")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("Needs an NVIDIA GPU, and torch sees none. Nothing was measured.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        if options.dry:
            os.environ |= {"ATTUNE_HOME": home, "CUDA_VISIBLE_DEVICES": ""}  # nothing of it is worth keeping
        benchmark(options)
    return 0


@torch.no_grad()
def benchmark(options: argparse.Namespace) -> None:
    load_package("attune_devtools", ROOT / "devtools")
    load_package("comfyui_attune", ROOT)
    from attune_devtools import comfyui

    import_comfy(comfyui.locate(), options.dry)
    from comfyui_attune.host import process
    from comfyui_attune.measure.shapes import WAN_14B, video_tokens

    about, size = (DRY_MODEL, DRY_SIZE) if options.dry else (MODEL, SIZES[options.size])
    machine = process.machine()
    process.verdicts().settle(machine.main_device.name, lambda name: print(f"trying {name}", flush=True))
    model = random_wan(torch.bfloat16, "cpu" if options.dry else "cuda", **about)
    gc.collect()
    result = {
        "benchmark": "real size",
        "machine": {
            "device": DRY if options.dry else machine.main_device.title,
            "host_attention": machine.host_attention,
            "torch": torch.__version__,
            "packages": dict(machine.packages),
            "python": platform.python_version(),
            "system": platform.system(),
        },
        "model": about,
        "tokens": video_tokens(*size, WAN_14B),
        "steps": options.steps,
        "exact": options.exact,
    }
    print(json.dumps(result), flush=True)

    def save(rows: list[Any]) -> None:
        if options.json:
            text = json.dumps({**result, "rows": rows}, indent=1)
            options.json.write_text(text + "\n", encoding="utf-8", newline="\n")

    measure(options, Sampling(model, size, about["text_dim"]), save)


if __name__ == "__main__":
    sys.exit(main())
