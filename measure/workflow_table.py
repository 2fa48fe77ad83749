"""The result of a whole workflow's measurement as text of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .bench_table import WIDTH
from .workflow_result import TOTAL

_HEAD = ("total", "spread", "speed", "sampling", "a step", "PSNR", "SSIM", "ran on")
_WIDTHS = (10, 8, 9, 10, 10, 11, 9)
_COLUMN = 12  # of the table of stages
_FEW = 3  # runs below which a spread says nothing

Row = Mapping[str, Any]


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:.1f} s"


def case_text(row: Row) -> str:
    """The size that a row was measured at, in words."""
    parts = []
    if row["frames"] is not None:
        parts.append(f"{row['frames']} frames")
    if row["width"] is not None:
        parts.append(f"{row['width']}x{row['height']}")
    return " ".join(parts) or "as the workflow says"


def stage_text(row: Row) -> str:
    return TOTAL if row["stage"] == TOTAL else f"{row['stage']} {row['node']}"


def _agreement(row: Row) -> tuple[str, str]:
    if row["largest_difference"] == 0:
        return "identical", "1"
    psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
    return psnr, "-" if row["ssim"] is None else f"{row['ssim']:.5f}"


def _spread(row: Row) -> str:
    if row["seconds"] is None or row["repeats"] < _FEW:
        return "-"
    return f"{(row['high_seconds'] - row['low_seconds']) / row['seconds']:.1%}"


def _line(total: Row, stages: Sequence[Row], baseline: Row | None, width: int) -> str:
    sampling = [row for row in stages if row["steps"] is not None and row["seconds"] is not None]
    each = [row["seconds_per_step"] for row in sampling if row["seconds_per_step"] is not None]
    times = "-"
    if baseline is not None and baseline["seconds"] and total["seconds"] and total["status"] == "measured":
        times = f"{baseline['seconds'] / total['seconds']:.2f} x"
    cells = (
        seconds_text(total["seconds"]),
        _spread(total),
        times,
        seconds_text(sum(row["seconds"] for row in sampling)) if sampling else "-",
        seconds_text(max(each)) if each else "-",
        *_agreement(total),
    )
    figures = "".join(f"{cell:>{size}}" for cell, size in zip(cells, _WIDTHS, strict=True))
    ran = total["observed"] or total["status"]
    return f"  {total['kernel']:<{width}}{figures}  {ran}"[:WIDTH].rstrip()


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def _stages(by_kernel: Mapping[str, Sequence[Row]]) -> list[str]:
    """Where the time went: a line for each stage, a column for each kernel, slowest stages first."""
    times: dict[str, dict[str, Row]] = {}
    for kernel, rows in by_kernel.items():
        for row in rows:
            times.setdefault(stage_text(row), {})[kernel] = row
    slowest = {stage: max(row["seconds"] or 0.0 for row in rows.values()) for stage, rows in times.items()}
    stages = sorted((stage for stage in times if slowest[stage]), key=lambda stage: -slowest[stage])
    width = max((len(stage) for stage in times), default=0) + 3
    kernels = [kernel for kernel, rows in by_kernel.items() if rows]
    beside = max(1, (WIDTH - width) // _COLUMN)
    lines = []
    for first in range(0, len(kernels), beside):
        some = kernels[first : first + beside]
        lines += ["", f"{'':<{width}}" + "".join(f"{_short(kernel):>{_COLUMN}}" for kernel in some)]
        for stage in stages:
            cells = [times[stage].get(kernel) for kernel in some]
            figures = ["-" if row is None else _stage_cell(row) for row in cells]
            lines.append(f"  {stage:<{width - 2}}" + "".join(f"{cell:>{_COLUMN}}" for cell in figures))
    kept = [stage for stage, rows in times.items() if all(row["status"] == "cached" for row in rows.values())]
    if kept:
        lines += _wrapped(f"from the server's cache: {', '.join(kept)}", "  ")
    return lines


def _stage_cell(row: Row) -> str:
    return "cached" if row["status"] == "cached" else seconds_text(row["seconds"])


def _short(kernel: str) -> str:
    return kernel if len(kernel) < _COLUMN else f"{kernel[: _COLUMN - 2]}…"


def workflow_table(result: Mapping[str, Any]) -> str:
    """The table of a result: for each size the kernels, where their time went, and what went wrong."""
    machine, rows = result["machine"], result["rows"]
    lines = [f"ComfyUI {machine['comfyui']} on {machine['device']}, torch {machine['torch']}"]
    for note in result["notes"]:
        lines += _wrapped(note, "")
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(case_text(row), []).append(row)
    for case, members in cases.items():
        totals = [row for row in members if row["stage"] == TOTAL]
        width = max(len(row["kernel"]) for row in totals) + 1
        baseline = next((row for row in totals if row["kernel"] == result["baseline"]), None)
        head = "".join(f"{name:>{size}}" for name, size in zip(_HEAD, _WIDTHS, strict=False))
        lines += ["", f"{members[0]['workflow']}, {case}", f"  {'':<{width}}{head}  {_HEAD[-1]}"]
        by_kernel = {row["kernel"]: [one for one in members if one["kernel"] == row["kernel"]] for row in totals}
        for row in totals:
            lines.append(_line(row, by_kernel[row["kernel"]][1:], baseline, width))
        lines += _stages({kernel: ones[1:] for kernel, ones in by_kernel.items()})
        for row in totals:
            if row["reason"]:
                what = "" if row["status"] == "measured" else f"{row['status']}: "
                lines += _wrapped(f"{row['kernel']}: {what}{row['reason']}", "  ")
    restless = [row for row in rows if row["kernel"] == result["baseline"] and row["largest_difference"]]
    if restless:
        said = (
            f"{result['baseline']} is not identical with itself (at {case_text(restless[0])}): something in the "
            "workflow is random, or the GPU adds in another order each time. Differences of that size say nothing."
        )
        lines += ["", *_wrapped(said, "")]
    repeats = max((row["repeats"] or 0 for row in rows), default=0)
    if repeats:
        baseline_name, runs = result["baseline"], f"median of {repeats} runs" if repeats > 1 else "one run"
        what = (
            f"total: {runs} after an untimed one; spread: the middle half of them; speed: times that of "
            f"{baseline_name}; a step: between two steps, of the slowest sampler; PSNR and SSIM: against "
            f"{baseline_name}, same seed ({baseline_name} itself: against its untimed run)."
        )
        if repeats < _FEW:
            what += " How much such a run scatters is not known: --repeats 3 tells."
        lines += ["", *_wrapped(what, "")]
    else:
        lines += ["", "Nothing was measured."]
    if result["interrupted"]:
        lines += ["", *_wrapped(f"Incomplete: {result['interrupted']}. What was measured until then is above.", "")]
    return "\n".join(lines)
