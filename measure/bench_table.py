"""A benchmark's result as text of at most 100 columns."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 100
_HEAD = ("time", "spread", "TFLOP/s", "of peak", "memory", "cosine", "rel. L1", "rel. L2", "max")
_RESTLESS = 0.1  # a spread that a quiet machine does not have
_WIDTHS = (9, 8, 8, 9, 9, 9, 8, 8, 8)


def time_text(ms: float) -> str:
    """Milliseconds with three digits that mean something, in a unit that fits."""
    value, unit = (ms * 1000, "us") if ms < 0.1 else (ms, "ms") if ms < 10_000 else (ms / 1000, "s")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def speed_text(tflops: float) -> str:
    if tflops < 0.01:
        return f"{tflops:.2g}"
    return f"{tflops:.3f}" if tflops < 1 else f"{tflops:.2f}" if tflops < 10 else f"{tflops:.0f}"


def _memory_text(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**30:.1f} GiB" if size >= 1000 * 2**20 else f"{size / 2**20:.3g} MiB"


def _error_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _cosine_text(value: float | None) -> str:
    return "-" if value is None else f"{min(value, 1.0):.6f}"


def _figures(row: Mapping[str, Any]) -> list[str]:
    share = row["peak_share"]
    return [
        time_text(row["median_ms"]),
        f"{(row['high_ms'] - row['low_ms']) / row['median_ms']:.1%}" if row["repeats"] > 1 else "-",
        speed_text(row["tflops"]),
        "-" if share is None else f"{share:.0%}",
        _memory_text(row["extra_bytes"]),
        _cosine_text(row["cosine"]),
        *(_error_text(row[name]) for name in ("l1", "l2", "largest")),
    ]


def _line(name: str, width: int, cells: Sequence[str]) -> str:
    parts = (f"{cell:>{size}}" for cell, size in zip(cells, _WIDTHS, strict=True))
    return f"  {name:<{width}}{''.join(parts)}".rstrip()


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=True, break_on_hyphens=False)


def case_text(row: Mapping[str, Any]) -> str:
    """A row's shape in words."""
    batch = f"batch {row['batch']}, " if row["batch"] > 1 else ""
    return (
        f"{row['shape']}, {row['dtype']}: {batch}{row['heads']} heads of {row['head_dim']}, "
        f"{row['q_len']:,} x {row['kv_len']:,} tokens"
    )


def _cases(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(case_text(row), []).append(row)
    return found


def device_text(machine: Mapping[str, Any]) -> str:
    name = str(machine.get("device") or "an unknown device")
    return f"{name} (CPU)" if machine.get("architecture") == "CPU" else name


def machine_text(machine: Mapping[str, Any]) -> str:
    parts = [device_text(machine), f"torch {machine.get('torch', '?')}"]
    if machine.get("driver"):
        parts.append(f"driver {machine['driver']}")
    if machine.get("threads"):
        parts.append(f"{float(machine['threads']):.0f} threads")
    return ", ".join([*parts, str(machine.get("system", ""))]).rstrip(", ")


def _at_work(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The device's clock and power over all rows, where its driver told them: other programs and limits show here."""
    told = []
    for name, unit in (("clock_mhz", "MHz"), ("power_w", "W")):
        values = [round(row[name]) for row in rows if row[name] is not None]
        if values:
            low, high = min(values), max(values)
            told.append(f"{low} {unit}" if low == high else f"{low} to {high} {unit}")
    return [f"The GPU at work: {', '.join(told)}"] if told else []


def _apart(reasons: str) -> list[str]:
    """ "a (b; c); d" as ["a (b; c)", "d"]."""
    parts = [""]
    for piece in reasons.split("; "):
        open_still = parts[-1].count("(") > parts[-1].count(")")
        parts = [*parts[:-1], f"{parts[-1]}; {piece}"] if open_still else [*parts, piece]
    return parts[1:]


def _main_reasons(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], str]:
    """One reason for each row without figures: of several the one that most rows share, as "no CUDA device"."""
    split = {
        (row["kernel"], row["shape"], row["dtype"]): _apart(row["reason"])
        if row["status"] == "refused"
        else [f"{row['status']}: {row['reason']}"]
        for row in rows
        if row["status"] != "measured"
    }
    shared = Counter(reason for reasons in split.values() for reason in reasons)
    found = {}
    for place, reasons in split.items():
        main = max(reasons, key=lambda reason: shared[reason])
        found[place] = main
    return found


def _not_run(cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Why kernels have no figures: each reason once, with its kernels, and with the cases where it is not for all.

    Reasons of a kernel that differ in their numbers alone, as in the memory needed, are told by the first of them.
    """
    rows = [row for members in cases.values() for row in members]
    by_kernel: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (kernel, shape, dtype), reason in _main_reasons(rows).items():
        without_numbers = re.sub(r"\d+(\.\d+)?", "0", reason)
        by_kernel.setdefault((without_numbers, kernel), []).append((reason, f"{shape} {dtype}"))
    groups: dict[tuple[str, str], list[str]] = {}
    for (_, kernel), told in by_kernel.items():
        reason, places = told[0][0], [place for _, place in told]
        where = ""
        if any(other != reason for other, _ in told):
            where = f" ({places[0]}; {len(places) - 1} more with other numbers)"
        elif len(places) < len(cases):
            where = f" ({', '.join(places[:2])}{f' and {len(places) - 2} more' if len(places) > 2 else ''})"
        groups.setdefault((reason, where), []).append(kernel)
    lines = ["", "Without figures (all reasons: in the CSV or JSON file):"] if groups else []
    for (reason, where), kernels in groups.items():
        lines += _wrapped(f"  {reason}{where}: {', '.join(kernels)}", "    ")
    return lines


def table(result: Mapping[str, Any]) -> str:
    """The table of a result, fastest first, and the reasons of what was not measured."""
    rows = result["rows"]
    cases = _cases(rows)
    lines = [machine_text(result["machine"])]
    peaks = result.get("peak_tflops", {})
    if peaks:
        told = ", ".join(f"{speed_text(peak)} TFLOP/s in {dtype}" for dtype, peak in peaks.items())
        lines.append(f"Matrix product at best: {told}")
    measured = [row for row in rows if row["status"] == "measured"]
    lines += _at_work(measured)
    width = max((len(row["kernel"]) for row in measured), default=0) + 1
    wrong: dict[str, list[Mapping[str, Any]]] = {}
    for title, members in cases.items():
        ran = sorted((row for row in members if row["status"] == "measured"), key=lambda row: row["median_ms"])
        if not ran:
            continue
        lines += ["", title, _line("", width, _HEAD)]
        for row in ran:
            lines.append(_line(row["kernel"], width, _figures(row)))
            if row["verdict"] != "works":
                wrong.setdefault(row["kernel"], []).append(row)
    if wrong:
        lines += ["", "Do not use these here:"]
    for kernel, failed in wrong.items():
        worst = max(failed, key=lambda row: math.inf if row["l2"] is None else row["l2"])
        rest = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        lines += _wrapped(f"  {kernel}: {worst['verdict']}, at {worst['shape']} {worst['dtype']}{rest}", "    ")
    lines += _not_run(cases)
    if measured:
        rows_compared = sorted({int(row["compared_rows"]) for row in measured if row["compared_rows"]})
        some = any(row["compared_rows"] < row["q_len"] for row in measured)
        compared = f"{rows_compared[0]} queries of each head" if some else "all queries"
        lines += [
            "",
            *_wrapped(
                "time: median; spread: the middle half of all calls, as a share of it; memory: peak beyond inputs and "
                f"output (CUDA only); errors: the worst of the kinds of input, against float32, on {compared}.",
                "",
            ),
        ]
        restless = sum((row["high_ms"] - row["low_ms"]) / row["median_ms"] > _RESTLESS for row in measured)
        if restless:
            said = (
                f"The spread is above {_RESTLESS:.0%} in {restless} of {len(measured)} rows: other programs may have "
            )
            lines += ["", *_wrapped(said + "been at work. Compare nothing with these; measure again.", "")]
    if result.get("interrupted"):
        lines += ["", f"Incomplete: {result['interrupted']}. What was measured until then is above."]
    if not measured:
        lines += ["", "Nothing was measured."]
    return "\n".join(lines)
