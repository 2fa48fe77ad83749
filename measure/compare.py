"""Two results of `attune bench`, row by row; of single calls, or of whole workflows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .bench_file import key

_FEW = 3  # repeats below which the quartiles say nothing
Verdict = Literal["faster", "slower", "within the spread", "spread unknown"]


@dataclass(frozen=True)
class Pair:
    """A row that both results measured."""

    a: Mapping[str, Any]
    b: Mapping[str, Any]

    @property
    def ratio(self) -> float:
        """How many times as fast as A B is: above 1 B is faster."""
        return float(self.a["median_ms"] / self.b["median_ms"])

    @property
    def verdict(self) -> Verdict:
        """Is the difference larger than the spread: do the middle halves of the two measurements not overlap?"""
        if min(self.a["repeats"], self.b["repeats"]) < _FEW:
            return "spread unknown"
        if self.b["high_ms"] < self.a["low_ms"]:
            return "faster"
        return "slower" if self.b["low_ms"] > self.a["high_ms"] else "within the spread"


@dataclass(frozen=True)
class Comparison:
    """`lost` and `gained` are rows that only A or only B measured though both have them; with B's or A's reason.

    `workflows`: the rows are stages of whole workflows.
    """

    pairs: list[Pair] = field(default_factory=list)
    lost: list[tuple[Mapping[str, Any], str]] = field(default_factory=list)
    gained: list[tuple[Mapping[str, Any], str]] = field(default_factory=list)
    only_a: list[Mapping[str, Any]] = field(default_factory=list)
    only_b: list[Mapping[str, Any]] = field(default_factory=list)
    machines: list[tuple[str, str, str]] = field(default_factory=list)
    workflows: bool = False

    def below(self, ratio: float) -> list[str]:
        """Why B does not reach `ratio` times the speed of A, a line for each row; empty where it does."""
        slow = [f"{name(pair.a)}: {pair.ratio:.3f}" for pair in self.pairs if pair.ratio < ratio]
        return slow + [f"{name(row)}: not measured any more ({why})" for row, why in self.lost]


def name(row: Mapping[str, Any]) -> str:
    return f"{row['kernel']}, {row['shape']}, {row['dtype']}"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compare what bench_file.read_result or workflow_result.read_workflow_result gave, two of one kind."""
    first, second = ({row.get("key") or key(row): row for row in result["rows"]} for result in (a, b))
    found = Comparison(
        machines=_differences(a["machine"], b["machine"]), workflows=any("key" in row for row in a["rows"])
    )
    for place, row in first.items():
        other = second.get(place)
        ran = row["status"] == "measured"
        if other is None:
            if ran:
                found.only_a.append(row)
        elif ran and other["status"] == "measured":
            found.pairs.append(Pair(row, other))
        elif ran:
            found.lost.append((row, other["reason"] or other["status"]))
        elif other["status"] == "measured":
            found.gained.append((other, row["reason"] or row["status"]))
    found.only_b.extend(row for place, row in second.items() if place not in first and row["status"] == "measured")
    return found


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, in A, in B) for all that the files say about both machines and that is not the same."""

    def text(value: Any) -> str:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return "-" if value in (None, "", [], {}) else ", ".join(value) if isinstance(value, list) else str(value)

    found = []
    for what in dict.fromkeys([*a, *b]):
        # CSV does not hold all of it: what one file cannot say is no difference.
        if what == "packages" or what not in a or what not in b:
            continue
        if text(a[what]) != text(b[what]):
            found.append((what.replace("_", " "), text(a[what]), text(b[what])))
    ours, theirs = (result.get("packages") or {} for result in (a, b))
    for package in sorted({*ours, *theirs}):
        if ours.get(package) != theirs.get(package):
            found.append((package, ours.get(package, "-"), theirs.get(package, "-")))
    return found


def _time(row: Mapping[str, Any]) -> str:
    from .bench_table import time_text

    if row["repeats"] < 2:
        return time_text(row["median_ms"])
    spread = (row["high_ms"] - row["low_ms"]) / row["median_ms"]
    return f"{time_text(row['median_ms'])} ({spread:.1%})"


def _rows(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    return [
        (
            pair.a["kernel"],
            pair.a["shape"],
            pair.a["dtype"],
            _time(pair.a),
            _time(pair.b),
            f"{pair.ratio:.3f}",
            pair.verdict,
        )
        for pair in pairs
    ]


_HEAD = ("kernel", "shape", "type", "A (spread)", "B (spread)", "A / B", "B is")
_WORKFLOW_HEAD = ("kernel", "workflow", "stage", *_HEAD[3:])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    if markdown:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
        return [f"| {' | '.join(row)} |" for row in cells]
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def comparison_text(found: Comparison, markdown: bool = False) -> str:
    """The comparison as text, or as Markdown for pasting."""
    dot = "- " if markdown else "  "
    lines: list[str] = []
    if found.pairs:
        lines += [*_table(_WORKFLOW_HEAD if found.workflows else _HEAD, _rows(found.pairs), markdown), ""]
        counts = {what: sum(pair.verdict == what for pair in found.pairs) for what in ("faster", "slower")}
        rest = len(found.pairs) - sum(counts.values())
        lines.append(
            f"Of {len(found.pairs)} rows B is faster in {counts['faster']}, slower in {counts['slower']}; in {rest} "
            "the difference is not larger than the spread."
        )
    else:
        lines.append("No row was measured in both files.")

    def section(head: str, items: Sequence[str]) -> None:
        if items:
            lines.extend(["", head, *([""] if markdown else []), *(f"{dot}{item}" for item in items)])

    section("Measured in A, not in B:", [f"{name(row)}: {why}" for row, why in found.lost])
    section("Measured in B, not in A:", [f"{name(row)}: {why}" for row, why in found.gained])
    section("Only in A:", [name(row) for row in found.only_a])
    section("Only in B:", [name(row) for row in found.only_b])
    if found.machines:
        lines += ["", "The machines differ:", *([""] if markdown else [])]
        lines += _table(("", "A", "B"), found.machines, markdown)
    else:
        lines += ["", "The files tell no difference between the machines."]
    return "\n".join(lines)
