"""The aims of attune_int8 and attune_bf16 on an H200, and whether figures of int8.py reach them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SELF = ("wan-32760", "wan-75600")
# On an H200: what is the least, the goal, and what would be better still.
TOPS = (880, 1050, 1200)
TIMES_AS_FAST = {
    "the best SDPA back end": (1.35, 1.6, 1.85),
    "kitchen_int8": (1.4, 1.6, 2.0),  # 0.2.40 or newer: the kernel's own rule
    "sage1": (1.6, 1.9, 2.2),
}
SAGE = "1.0.6"
DRY = "no GPU, a dry run"
REACHED = ("met", "goal met", "stretch met")
Row = Mapping[str, Any]


def judge(found: float, steps: Sequence[float], most: bool = False) -> str:
    """steps: what is the least (with `most`, the most) to be met, and better ones behind it."""
    reached = sum(found <= step if most else found >= step for step in steps)
    return REACHED[reached - 1] if reached else "missed"


def verdicts(
    rows: Sequence[Row], left_out: Mapping[str, Mapping[str, str]], first: Mapping[str, float | str], gpu: str
) -> Iterator[dict[str, Any]]:
    """Each aim beside what was found: {aim, shape, wanted, found, verdict}.

    left_out: shape → kernel → why it was not timed. first: kernel → seconds of its first use, or why there are none.
    A figure that is missing is never met. Speeds are judged on an H200 alone, as that is what they are asked of, and
    nothing is in a dry run.
    """
    by = {(row["shape"], row["kernel"]): row for row in rows}
    timed = "" if "H200" in gpu else f"no verdict: the aim is an H200's, this is {gpu}"
    dry = "no verdict: a dry run" if gpu == DRY else ""

    def one(aim: str, shape: str, found: float | str, steps: Sequence[float], most: bool = False, no: str = "") -> Any:
        verdict = f"not measured: {found}" if isinstance(found, str) else dry or no or judge(found, steps, most)
        figure = None if isinstance(found, str) else found
        return {"aim": aim, "shape": shape, "wanted": list(steps), "found": figure, "verdict": verdict}

    def why(shape: str, kernel: str) -> str:
        return f"{kernel}: {left_out[shape].get(kernel, 'not timed')}" if shape in left_out else f"{shape} not run"

    def figure(shape: str, kernel: str, name: str) -> float | str:
        row = by.get((shape, kernel))
        return why(shape, kernel) if row is None else row.get(name, f"{kernel}: no figure")

    def ratio(shape: str, ours: str, others: Sequence[str], title: str) -> float | str:
        mine = figure(shape, ours, "ms")
        theirs = [by[shape, other]["ms"] for other in others if (shape, other) in by]
        if isinstance(mine, str) or not theirs:
            return mine if isinstance(mine, str) else why(shape, others[0]) if others else f"no {title} was timed"
        return min(theirs) / mine

    sdpa = ("sdpa", *sorted({row["kernel"] for row in rows if row["kernel"].startswith("sdpa_")}))
    exact = sorted({row["kernel"] for row in rows if row["exact"]} - {"attune_bf16"})
    for shape in SELF:
        yield one("attune_int8: TOPS", shape, figure(shape, "attune_int8", "tops"), TOPS, no=timed)
        for other, steps in TIMES_AS_FAST.items():
            names, no = (sdpa if other not in ("kitchen_int8", "sage1") else (other,)), timed
            version = by.get((shape, other), {}).get("version", "")
            if other == "sage1" and version != SAGE:
                no = no or f"no verdict: the aim is against sageattention {SAGE}, this is {version or 'unknown'}"
            found = ratio(shape, "attune_int8", names, other)
            yield one(f"attune_int8: times as fast as {other}", shape, found, steps, no=no)
        found = ratio(shape, "attune_bf16", exact, "exact kernel")
        yield one("attune_bf16: times as fast as the best exact kernel", shape, found, (0.9,), no=timed)
        found, allowed = figure(shape, "attune_int8", "extra"), figure(shape, "attune_int8", "allowed")
        if not isinstance(found, str) and not isinstance(allowed, str):
            found /= allowed
        # Padding and numbers per channel are below one part in a hundred.
        yield one("attune_int8: memory beyond that of K and V in 8 bits (e4m3)", shape, found, (1.01,), most=True)
    for shape, least in (("wan-cross", 1.0), ("sdxl-4096", 1.1)):
        verdict = one(
            "attune_int8: times as fast as the best SDPA back end, or auto sends it there",
            shape, ratio(shape, "attune_int8", sdpa, "SDPA back end"), (least,), no=timed,
        )  # fmt: skip
        if verdict["verdict"] == "missed":
            verdict["verdict"] += ": auto has to send it to SDPA; look at what it measures"
        yield verdict
    for kernel, most in (("attune_int8", 3), ("attune_bf16", 1)):
        for name, title, steps in (
            ("launches", "launches a call", (most,)),
            ("cpu_us", "microseconds of the CPU a call", (30,)),
            ("waits", "does a call wait for the GPU", (0,)),
        ):
            shapes = [row["shape"] for row in rows if row["kernel"] == kernel and name in row]
            worst = max(by[shape, kernel][name] for shape in shapes) if shapes else figure(SELF[0], kernel, name)
            yield one(f"{kernel}: {title}", "the worst", worst, steps, most=True)
        seconds = first.get(kernel, "not tried")
        yield one(f"{kernel}: seconds of the first use", "any", seconds, (20,), most=True)


def told(verdict: Row) -> str:
    found = "" if verdict["found"] is None else f"{float(verdict['found']):.4g}, "
    wanted = " / ".join(f"{step:g}" for step in verdict["wanted"])
    return f"  {verdict['aim']} ({verdict['shape']}; wanted {wanted}): {found}{verdict['verdict']}"
