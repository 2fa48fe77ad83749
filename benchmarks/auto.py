"""Is `auto` as fast as the best kernel, and never slower than the host? Whole sampling runs of a small Wan model.

    python benchmarks/auto.py --comfyui FOLDER [--rounds 5] [--steps 20] [--blocks 30] [--tokens 1024] [--json FILE]

A Wan model with random weights (2 heads of 128, `blocks` blocks) is sampled by ComfyUI's own euler, with nothing on it
(host), with one kernel named, and with `auto`: its first run, which measures, and later ones, when nothing is left to
measure. Rounds take turns, so what else the machine does hits all of them; figures are medians over rounds. On a CPU:
one thread, and the process's own time beside the wall clock's, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from wan_model import import_comfy, random_wan

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from support.loading import load_package  # noqa: E402

KERNELS = ("sdpa_flash", "sdpa_math", "split", "sub_quad")


def main() -> None:
    parser = argparse.ArgumentParser(description="Is auto as fast as the best kernel?")
    parser.add_argument("--comfyui", type=Path, required=True, help="the folder of ComfyUI")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1024, help="a multiple of 32")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["ATTUNE_HOME"] = home
        os.environ.pop("ATTUNE_TUNE", None)
        result = measure(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import_comfy(options.comfyui, options.device == "cpu")
    load_package("comfyui_attune", ROOT)
    if options.device == "cpu":
        torch.set_num_threads(1)
    import comfy.sample

    from comfyui_attune.attention.policy import Rule
    from comfyui_attune.host import process
    from comfyui_attune.host.comfyui import attach
    from comfyui_attune.host.runs import RUNS

    model = random_wan(torch.float16, blocks=options.blocks, dim=256, ffn_dim=512, text_dim=768)
    kernels = tuple(filter(None, options.kernels.split(",")))
    machine, timings = process.machine(), process.MEASURED.timings
    process.verdicts().settle(machine.main_device.name)  # before anything is timed
    latent = torch.zeros(1, 16, 1, 2 * 32, options.tokens // 32 * 2)
    generator = torch.Generator().manual_seed(0)
    noise, text = torch.randn(latent.shape, generator=generator), torch.randn(1, 256, 768, generator=generator)
    models = {name: attach(model, Rule((name,), source="1")) for name in (*kernels, "auto")}

    def run(name: str, steps: int) -> tuple[float, float, torch.Tensor]:
        """(wall seconds, process seconds, latent) of one sampling run; on CUDA the process's time means nothing."""
        conditioning = [[text, {}]]
        chosen = model if name == "host" else models["auto" if name.startswith("auto") else name]
        wall, own = time.perf_counter(), time.process_time()
        out = comfy.sample.sample(
            chosen, noise, steps, 3.0, "euler", "simple", conditioning, conditioning, latent, seed=1,
            disable_pbar=True,
        )  # fmt: skip
        return time.perf_counter() - wall, time.process_time() - own, out

    names = ("host", *kernels, "auto, first run", "auto, later runs")
    for name in ("host", *kernels):
        run(name, 1)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    chosen, measuring, settling, notes, same = [], [], [], [], []
    for number in range(options.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        if number % len(names):  # the first run of auto comes before the later ones
            order = (*(n for n in order if n != names[-1]), names[-1])
        for name in order:
            if name == "auto, first run":
                timings.known.clear()
                timings.host_seconds.clear()
                timings.allowance = 0.0
            wall, own, out = run(name, options.steps)
            taken[name].append((wall, own))
            record = RUNS.all()[-1].record
            if name == "auto, first run":
                measuring.append(record.measuring / wall)
                settling.append(0)
                while record.measuring and settling[-1] < 10:  # what its one percent was not enough for
                    notes = record.notes or notes
                    run("auto", options.steps)
                    record = RUNS.all()[-1].record
                    settling[-1] += 1
            elif name == "auto, later runs":
                chosen.append(dict(record.observed()))
                if number == 0:
                    same.append(torch.equal(out, run("auto", options.steps)[2]))
            print(f"{number + 1}/{options.rounds} {name:<18} {wall:7.2f} s, own {own:7.2f} s", flush=True)
    known = {key: {name: vars_of(one) for name, one in found.items()} for key, found in timings.known.items()}
    which = 0 if options.device == "cuda" else 1
    medians = {name: statistics.median(one[which] for one in taken[name]) for name in names}
    best = min(kernels, key=medians.__getitem__)

    def share(name: str, other: str) -> float:
        """Median over rounds of the ratio within a round."""
        ratios = [a[which] / b[which] for a, b in zip(taken[name], taken[other], strict=True)]
        return round(statistics.median(ratios), 4)

    result = {
        "benchmark": "auto",
        "machine": {
            "device": machine.main_device.title,
            "host_attention": machine.host_attention,
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "options": {name: getattr(options, name) for name in ("rounds", "steps", "blocks", "tokens")},
        "clock": "wall" if which == 0 else "process time, one thread",
        "seconds": {name: round(seconds, 3) for name, seconds in medians.items()},
        "wall_seconds": {name: round(statistics.median(one[0] for one in taken[name]), 3) for name in names},
        "best": best,
        "later_over_best": share("auto, later runs", best),
        "later_over_host": share("auto, later runs", "host"),
        "first_over_host": share("auto, first run", "host"),
        "measuring_share": round(max(measuring), 4),
        "untimed_runs_after_the_first": settling,
        "kernels_that_ran": chosen,
        "measured": known,
        "same_bits": all(same),
        "notes": notes,
    }
    print(json.dumps(result, indent=1))
    return result


def vars_of(measured: Any) -> dict[str, Any]:
    return {"share_of_host": round(measured.ratio, 3) if measured.pairs else None, "timings": len(measured.pairs),
            "l2": measured.l2, "reason": measured.reason}  # fmt: skip


if __name__ == "__main__":
    main()
