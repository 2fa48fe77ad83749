"""The error study of docs/int8.md: what each part of attune_int8's arithmetic is worth, on a CPU.

    python benchmarks/int8_errors.py [--lengths 8192 32768] [--queries 64] [--device cuda] [--json FILE]

The arithmetic is that of tests/support/int8_recipes.py, in PyTorch; the tests hold it against the kernel. Printed is
the relative L2 error against float64, as rows of Markdown; the file also has L1 and the cosine. With --device cuda the
lossy kernels that can run there are asked as well (attune_int8, sage1, …), in bfloat16; others are told with reasons.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from support import int8_recipes as recipes  # noqa: E402
from support.loading import load_package  # noqa: E402

# What is changed in the recipe.
RECIPES: dict[str, dict[str, Any]] = {
    "attune_int8": {},
    "… with exact sums within a block": {"sums": "float32"},
    "… with one sum for all blocks": {"sums": "single"},
    "without correcting the mean of V": {"smooth_v": "mean"},
    "without smoothing V": {"smooth_v": "no"},
    "without smoothing K": {"smooth_k": False},
    "without rotation": {"turned": 0},
    "without rotation, K per 128 tokens": {"turned": 0, "k_group": 128},
    "K per 128 tokens": {"k_group": 128},
    "weights of at most 1": {"top": 1.0},
    "V in fp16": {"fp8": False},
    "V in fp16, without rotation": {"fp8": False, "turned": 0},
    **{f"V in fp16, {n} channels rotated together": {"fp8": False, "turned": n} for n in (16, 32, 128)},
}
# The recipes of the study in docs/kernels.md, and what it lists for the first four kinds: how hard its inputs were.
_BLOCK = {"q_group": 128, "k_group": 128, "turned": 0, "smooth_v": "no", "fp8": False}
STUDY: dict[str, tuple[dict[str, Any], str]] = {
    "int8 per block, no smoothing, fp16 PV": ({**_BLOCK, "smooth_k": False}, ".0036 .0068 .0008 .0172"),
    "int8 per block, smooth K, fp16 PV": (_BLOCK, ".0036 .0042 .0007 .0156"),
    "int8 per token, smooth K, fp8 PV": ({"turned": 0, "smooth_v": "no"}, ".0039 .0042 .0023 .0095"),
    "… and rotated": ({"turned": 128, "smooth_v": "no"}, ".0039 .0040 .0022 .0081"),
    "… and one sum for all blocks": ({"turned": 128, "smooth_v": "no", "sums": "single"}, ".0241 .0318 .0247 .0330"),
    "… and weights of at most 1": ({"turned": 128, "smooth_v": "no", "top": 1.0}, ".0253 .0351 .0556 .0265"),
}
STUDY_LENGTH = 32_768
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def recipes_of(length: int) -> Iterator[tuple[str, Attend]]:
    for name, changes in RECIPES.items():
        yield name, lambda *qkv, changes=changes: recipes.attune_int8(*qkv, **changes)
    yield "SageAttention 2", recipes.sage2
    for name, (changes, listed) in STUDY.items() if length == STUDY_LENGTH else ():
        yield f"{name} (listed: {listed})", lambda *qkv, changes=changes: recipes.attune_int8(*qkv, **changes)


def kernels() -> Iterator[tuple[str, Attend]]:
    """The lossy kernels that can run on this GPU."""
    from comfyui_attune.attention.call import Layout
    from comfyui_attune.attention.kernel import machine_reasons
    from comfyui_attune.attention.machine import read_machine
    from comfyui_attune.kernels import KERNELS

    machine = read_machine()
    for kernel in KERNELS:
        if kernel.exact:
            continue
        if reasons := machine_reasons(kernel, machine):
            print(f"{kernel.name}: left out: {'; '.join(reasons)}")
            continue
        run, swap = kernel.load(), kernel.layout is Layout.BNHD

        def attend(*qkv: torch.Tensor, run: Any = run, swap: bool = swap) -> torch.Tensor:
            given = [tensor.bfloat16() for tensor in qkv]
            out = run(*(tensor.transpose(1, 2) if swap else tensor for tensor in given))
            return out.transpose(1, 2) if swap else out

        version = f" {machine.packages[kernel.package]}" if kernel.package in machine.packages else ""
        yield f"the kernel {kernel.name}{version}", attend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32_768, 75_600])
    parser.add_argument("--queries", type=int, help="of each of four heads (64, and 16 beyond 8192 keys)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load_package("comfyui_attune", ROOT)
    from comfyui_attune.attention.errors import measure_errors

    torch.set_num_threads(1)
    real = list(kernels()) if options.device == "cuda" else []
    rows = []
    for length in options.lengths:
        cases, queries = {}, options.queries or (64 if length <= 8192 else 16)
        for kind in (*recipes.KINDS, "bias_k_40"):
            q, k, v = recipes.make_case(kind, queries, length, device=options.device)
            cases[kind] = q, k, v, recipes.exact(q, k, v)
        print(f"\n{length} keys\n\n| recipe | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}", flush=True)
        for name, attend in [*recipes_of(length), *real]:
            found = {kind: measure_errors(attend(q, k, v), wanted) for kind, (q, k, v, wanted) in cases.items()}
            print(f"| {name} | {' | '.join(f'{errors.l2:.4f}' for errors in found.values())} |", flush=True)
            about = {"recipe": name, "keys": length, "queries": queries}
            rows += [
                {**about, "kind": kind, "l2": errors.l2, "l1": errors.l1, "cosine": errors.cosine}
                for kind, errors in found.items()
            ]
    if options.json:
        about = {"heads": 4, "device": options.device}
        text = json.dumps({"kind": "attune int8 errors", **about, "rows": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
