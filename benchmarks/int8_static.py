"""What the compiler makes of the kernels in kernels/int8/, for GPUs that are not here: benchmarks/static/sm_*.json.

    python benchmarks/int8_static.py [--target sm_90 ...] [--case attend-128 ...] [--assembly FOLDER] [--write]

Compiled is every tile that the pack ships, in bfloat16. Prints a line per kernel and tile; with --write the reports are
written (all cases of a target, so without --case). What the fields mean is said in triton_static.py. A case is reported
with the tile that is taken unmeasured; `others` are those that are measured beside it, without their mix.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks")]
import triton_static  # noqa: E402

from support.loading import load_package  # noqa: E402

REPORTS = ROOT / "benchmarks" / "static"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Kernel and width; "mask": a bool mask over queries and keys, and with "float" one of numbers; "short": few keys.
SHIPPED = tuple(
    f"{kind}-{width}{rest}"
    for kind, short in (("attend", ""), ("attend", "-short"), ("exact", ""))
    for width in (64, 128, 256)
    for rest in (short, f"-mask{short}")
)
# "padded": fewer channels than the width; "fp32": inputs in float32; "pointers": where strides suit no descriptor.
VARIANTS = (
    *(f"{kind}-{width}" for kind in ("quantise", "statistics") for width in (64, 128, 256)),
    *("attend-128-mask-float", "attend-128-padded", "attend-128-fp32", "quantise-128-fp32", "exact-128-pointers"),
)
CASES = SHIPPED + VARIANTS
load_package("comfyui_attune", ROOT)


def candidates(name: str, target: str) -> tuple[Any, ...]:
    """The tiles that the pack has for a case on `target`, the one that is taken unmeasured first."""
    from comfyui_attune.kernels.int8 import tiles

    kind, width, *rest = name.split("-")
    capability = divmod(int(target.removeprefix("sm_")), 10)
    table = tiles.EXACT if kind == "exact" else tiles.SHORT if "short" in rest else tiles.INT8
    return tiles.candidates_for(table, capability, int(width), "mask" in rest)


def make_case(name: str, target: str, tile: Any = None) -> Any:
    """The Case `name` of CASES with this tile; None is the first that the pack has for `target`."""
    from comfyui_attune.kernels.int8 import exact, forward, quantise, tiles

    tile = tile or candidates(name, target)[0]
    kind, width_text, *rest = name.split("-")
    width = int(width_text)
    mask = ("float" if "float" in rest else "bool") if "mask" in rest else ""
    inputs, values = "fp32" if "fp32" in rest else "bf16", "fp8e4nv" if tile.fp8 else "fp16"
    types = {name: f"*{inputs}" for name in ("Q", "K", "V", "Out")}
    types |= {"K8": "*i8", "V8": f"*{values}", "Mask": f"*{inputs}" if mask == "float" else "*i1"}
    types |= dict.fromkeys(("KScale", "Numbers"), "*fp32")
    types |= dict.fromkeys(("scale", "half_largest"), "fp32")
    constants: dict[str, Any] = {"D": width, "EMULATE": False}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if kind in ("attend", "exact"):
        kernel = exact.attend_exact if kind == "exact" else forward.attend
        tma = tile.tma and "pointers" not in rest
        constants |= {"BM": tile.bm, "BN": tile.bn, "STAGES": tile.stages, "TMA": tma}
        constants |= {"MASK": mask, "BY_QUERY": bool(mask), "PADDED": "padded" in rest, "WIDE": False}
        constants |= {"ROTATE": tile.rotate, "FP8": tile.fp8}
        if tma:
            block = f"{width},{tile.bn}" if tile.fp8 else f"{tile.bn},{width}"
            types |= {"K8": f"tensordesc<i8[{tile.bn},{width}]>", "V8": f"tensordesc<{values}[{block}]>"}
            if kind == "exact":
                types |= dict.fromkeys(("K", "V"), f"tensordesc<bf16[1,{tile.bn},1,{width}]>")
    else:
        kernel = quantise.quantise if kind == "quantise" else quantise.collect_statistics
        constants |= {"BT": tiles.at_once(width), "ROTATE": tile.rotate, "FP8": tile.fp8}
        options = {"num_warps": 8}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    # A model's tensors: channels side by side, and everything else at multiples of 16.
    constants |= {name: 1 for name in names if name.endswith("_sd")}
    if mask:
        constants["m_sm"] = 1
    types = {name: types.get(name, "i32") for name in names if name not in constants}
    divisible = tuple(
        name
        for name, kind in types.items()
        if kind.startswith("*") or name in ("kv_pad", "dim", "chunk") or name[1:3] == "_s"
    )
    return triton_static.Case(name, kernel, types, constants, divisible, options)


def report(name: str, target: str, tile: Any = None, assembly: Path | None = None) -> dict[str, Any]:
    """The report of one case, with its tile."""
    case = make_case(name, target, tile)
    sizes = {key: case.constants[key] for key in ("BM", "BN", "BT", "STAGES", "TMA", "FP8") if key in case.constants}
    return {"tile": sizes, **triton_static.measure(case, target, assembly)}


def reports(name: str, target: str, assembly: Path | None = None) -> dict[str, Any]:
    """`report` with the first tile, and those of the others under `others`."""
    found = report(name, target, assembly=assembly)
    if name in SHIPPED:
        found["others"] = [report(name, target, tile) for tile in candidates(name, target)[1:]]
        for other in found["others"]:
            del other["loop"]["mix"], other["matrix"]
    return found


def line(name: str, target: str, found: dict[str, Any]) -> str:
    loop, tile = found["loop"], found["tile"]
    text = f"{target:6} {name:21} registers {found['registers']:3}, stack {found['stack']:3} B, "
    text += f"shared {found['shared']:6} B, narrow {found['narrow']}"
    if "BM" not in tile:
        return text
    each = loop["instructions"] * 32 * found["warps"] / (tile["BM"] * tile["BN"])
    return (
        f"{text}; loop {tile['BM']}x{tile['BN']}, {found['warps']} warps, {tile['STAGES']} stages: "
        f"{loop['instructions']} instructions, {each:.1f} per score, {loop['spills']} spills, "
        f"{loop['overlapped']} exponentials overlapped, {loop['fresh']} of {loop['e4m3']} fresh: {loop['order'][:60]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=TARGETS, metavar="SM")
    parser.add_argument("--case", nargs="+", default=CASES, choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--assembly", type=Path, metavar="FOLDER", help="leave PTX, TTGIR and SASS there")
    parser.add_argument("--write", action="store_true", help=f"write {REPORTS.relative_to(ROOT)}/sm_*.json")
    options = parser.parse_args()
    if options.write and tuple(options.case) != CASES:
        parser.error("--write wants all cases: leave --case out")
    import triton

    for target in options.target:
        found = {}
        for name in options.case:
            found[name] = reports(name, target, options.assembly)
            for each in (found[name], *found[name].get("others", ())):
                print(line(name, target, each), flush=True)
        if options.write:
            REPORTS.mkdir(exist_ok=True)
            text = json.dumps({"triton": triton.__version__, "kernels": found}, indent=1)
            (REPORTS / f"{target}.json").write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
