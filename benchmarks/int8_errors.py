"""The error study of docs/int8.md: what each part of attune_int8's arithmetic is worth, on a CPU.

    python benchmarks/int8_errors.py [--lengths 8192 32768] [--queries 128] [--json FILE]

The arithmetic is that of tests/support/int8_recipes.py, in PyTorch; the tests hold it against the kernel. Printed is
the relative L2 error against float64, as rows of Markdown; the file also has L1 and the cosine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# What is changed in the recipe.
RECIPES: dict[str, dict[str, Any]] = {
    "attune_int8": {},
    "… with a tensor core's few bits within a block": {"sums": "fresh"},
    "… and one sum for all blocks": {"sums": "single"},
    "without correcting the mean of V": {"smooth_v": "mean"},
    "without smoothing V": {"smooth_v": "no"},
    "without rotation": {"turned": 0},
    "without rotation, K per 128 tokens": {"turned": 0, "k_group": 128},
    "K per 128 tokens": {"k_group": 128},
    "without smoothing K": {"smooth_k": False},
    "weights of at most 1": {"top": 1.0},
    "V in fp16": {"fp8": False},
    "V in fp16, without rotation": {"fp8": False, "turned": 0},
    **{f"V in fp16, {n} channels rotated together": {"fp8": False, "turned": n} for n in (16, 32, 128)},
    "V in fp16, K per 128 tokens": {"fp8": False, "k_group": 128},
}


def load(name: str, path: Path, **options: Any) -> Any:
    spec = importlib.util.spec_from_file_location(name, path, **options)
    assert spec and spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32_768, 75_600])
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load("comfyui_attune", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    recipes = load("attune_int8_recipes", ROOT / "tests" / "support" / "int8_recipes.py")
    from comfyui_attune.attention.errors import measure_errors

    torch.set_num_threads(1)
    rows = []
    for length in options.lengths:
        cases = {}
        for kind in recipes.KINDS:
            q, k, v = recipes.make_case(kind, options.queries, length)
            cases[kind] = q, k, v, recipes.exact(q, k, v)
        print(f"\n{length} keys\n\n| recipe | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}", flush=True)
        for name, changes in [*RECIPES.items(), ("SageAttention 2", None)]:
            found = {}
            for kind, (q, k, v, wanted) in cases.items():
                out = recipes.sage2(q, k, v) if changes is None else recipes.attune_int8(q, k, v, **changes)
                found[kind] = measure_errors(out, wanted)
            print(f"| {name} | {' | '.join(f'{errors.l2:.4f}' for errors in found.values())} |", flush=True)
            rows += [
                {
                    "recipe": name,
                    "keys": length,
                    "kind": kind,
                    "l2": errors.l2,
                    "l1": errors.l1,
                    "cosine": errors.cosine,
                }
                for kind, errors in found.items()
            ]
    if options.json:
        text = json.dumps({"kind": "attune int8 errors", "queries": options.queries, "rows": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
