"""The doctor's report as a picture: what to show and where, as data. paint.py draws it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .diagnose import Diagnosis
from .report import Report, device_line, figure, host_line, scrub, versions

WIDTH = 1760  # pixels
_EDGE, _GAP, _PAD = 40, 26, 10  # around everything, between columns, inside a row
_NOTE = 640  # the least width of the last column


class Style(NamedTuple):
    """Letters: their height in pixels, how they are cut, and their colour."""

    size: int
    cut: str  # "plain", "bold" or "code"
    colour: str


TITLE = Style(40, "bold", "#f5f6f8")
SUB = Style(21, "plain", "#aab1bd")
HEAD = Style(18, "bold", "#8d96a5")
NAME = Style(21, "bold", "#f5f6f8")
CELL = Style(20, "plain", "#d6dae1")
BADGE = Style(18, "bold", "#12151a")
NOTE = Style(18, "plain", "#c3c9d3")
QUIET = Style(17, "plain", "#8d96a5")
CODE = Style(17, "code", "#9fd0ff")
PAPER, STRIPE, RULE = "#171a20", "#1e222a", "#343a46"
COLOURS = {
    "works": "#4cc38a",
    "not installed": "#8fa3bf",
    "unsupported": "#8fa3bf",
    "cannot import": "#f2b84b",
    "wrong numbers": "#ff7b72",
    "crashed": "#ff7b72",
    "hung": "#e58cf0",
    "undecided": "#74b3f5",
}
_OUT_OF_REACH = "#727d8d"  # the badge of what no installation would change

Measure = Callable[[str, Style], float]  # the width of a line in pixels


class Letters(NamedTuple):
    """One line of text: its left end and its top in pixels."""

    x: float
    y: float
    text: str
    style: Style


class Box(NamedTuple):
    """A filled rectangle in pixels, with corners rounded by `radius`."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    radius: float = 0


class Drawing(NamedTuple):
    """Everything in the picture, in the order in which it is painted."""

    width: int
    height: int
    items: Sequence[Letters | Box]


def line_height(style: Style) -> float:
    return round(style.size * 1.42)


def _plain(text: str) -> str:
    """One line without what a terminal would act on."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).split())


def wrap(text: str, style: Style, width: float, measure: Measure) -> list[str]:
    """Lines of at most `width` pixels. What has no space to break at is broken anywhere."""
    lines, line = [], ""
    for word in _plain(text).split():
        longer = f"{line} {word}" if line else word
        if measure(longer, style) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while measure(word, style) > width and len(word) > 1:
            cut = next((n for n in range(len(word) - 1, 1, -1) if measure(word[:n], style) <= width), 1)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines


def _short(command: str) -> str:
    """A command without this machine's own paths, which make it long and name their user; as the README has it."""
    python = sys.executable or "python"
    for long, short in ((f'"{python}"', "python"), (python, "python")):
        command = command.replace(long, short)
    pack = r'^python ("[^"]*"|\S*[\\/]\S*|ComfyUI-Attune) get '
    return re.sub(pack, "python custom_nodes/ComfyUI-Attune get ", command)


def _notes(one: Diagnosis) -> list[tuple[str, Style]]:
    """The last column: what is the matter, in whose words, and what to do."""
    verdict, cure = one.verdict, one.cure
    said = []
    if one.cause:
        said.append((one.cause, QUIET if one.helpless else NOTE))
    if verdict.detail and not verdict.works and not verdict.reasons:
        said.append((verdict.detail.partition("\n")[0][:300], QUIET))
    if cure is not None and not one.helpless:
        said.append((cure.text, NOTE))
        if cure.command:
            said.append((_short(cure.command), CODE))
    if one.advice:
        said.append((one.advice, QUIET if one.helpless else NOTE))
    return [(scrub(text), style) for text, style in said]


class _Row(NamedTuple):
    name: str
    precision: str
    outcome: str
    error: str
    time: str
    notes: list[tuple[str, Style]]
    colour: str


def _rows(report: Report) -> list[_Row]:
    rows = []
    for one in report.diagnoses:
        verdict = one.verdict
        error = "" if verdict.error is None else f"{verdict.error:.1e}" if verdict.error else "0"
        time = "" if verdict.milliseconds is None else f"{figure(verdict.milliseconds)} ms"
        colour = _OUT_OF_REACH if one.helpless else COLOURS[verdict.outcome]
        name, precision = one.kernel.name, one.kernel.precision
        rows.append(_Row(name, precision, verdict.outcome, error, time, _notes(one), colour))
    for row in report.elsewhere:
        notes = [("; ".join(row["reasons"]) or "ComfyUI's own.", QUIET)]
        rows.append(_Row(row["name"], row["precision"], row["status"], "", "", notes, _OUT_OF_REACH))
    return rows


_HEADS = ("kernel", "precision", "verdict", "error", "time", "what it means, and what to do")


class _Page:
    """The picture under way: items so far, and how far down they reach."""

    def __init__(self, measure: Measure):
        self.items: list[Letters | Box] = []
        self.y: float = _EDGE
        self.measure = measure

    def text(self, text: str, style: Style, x: float = _EDGE, width: float = WIDTH - 2 * _EDGE) -> None:
        """A paragraph below what is there."""
        for line in wrap(text, style, width, self.measure):
            self.items.append(Letters(x, self.y, line, style))
            self.y += line_height(style)

    def columns(self, rows: Iterable[_Row]) -> list[float]:
        """The left ends of the columns."""
        cells = [(NAME, HEAD), (CELL, HEAD), (BADGE, HEAD), (CELL, HEAD), (CELL, HEAD)]
        ends, x = [], float(_EDGE + _PAD)
        for place, (style, head) in enumerate(cells):
            widest = max((self.measure(row[place], style) for row in rows), default=0)
            extra = 2 * _PAD if style is BADGE else 0
            ends.append(x)
            x += max(widest + extra, self.measure(_HEADS[place], head)) + _GAP
        return [*ends, min(x, WIDTH - _EDGE - _NOTE)]

    def group(self, rows: Sequence[_Row], left: Sequence[float], stripe: bool) -> None:
        """Rows that share their last column."""
        start, height = self.y, line_height(NAME) + _PAD
        room = WIDTH - _EDGE - _PAD - left[5]
        note = [
            (line, style) for text, style in rows[0].notes for line in wrap(text, style, room, self.measure)
        ]  # fmt: skip
        needed = sum(line_height(style) for _, style in note) + _PAD
        end = start + max(len(rows) * height, needed) + _PAD
        if stripe:
            self.items.append(Box(_EDGE, start, WIDTH - 2 * _EDGE, end - start, STRIPE, 6))
        for number, row in enumerate(rows):
            y = start + _PAD + number * height
            self.items.append(Letters(left[0], y, row.name, NAME))
            self.items.append(Letters(left[1], y + 1, row.precision, CELL))
            wide = self.measure(row.outcome, BADGE) + 2 * _PAD
            self.items.append(Box(left[2], y - 1, wide, line_height(BADGE) + 4, row.colour, 7))
            self.items.append(Letters(left[2] + _PAD, y + 1, row.outcome, BADGE))
            self.items.append(Letters(left[3], y + 1, row.error, CELL))
            self.items.append(Letters(left[4], y + 1, row.time, CELL))
        y = start + _PAD + 2
        for line, style in note:
            self.items.append(Letters(left[5], y, line, style))
            y += line_height(style)
        self.y = end


def draw(report: Report, measure: Measure) -> Drawing:
    """Where everything stands. `measure` says how wide a line is in the letters that will be used."""
    page, machine, device = _Page(measure), report.machine, report.device
    page.text(device.title if device.type != "cpu" else f"CPU ({device.title})", TITLE)
    page.y += 4
    if device.type != "cpu":
        page.text("  ·  ".join(part for part in (device.name, device.kind, device.room) if part), SUB)
    page.text("  ·  ".join(versions(machine)), SUB)
    packages = [f"{name} {version}".rstrip() for name, version in sorted(machine.packages.items()) if name != "triton"]
    page.text(f"Attention packages: {'  ·  '.join(packages) or 'none'}", SUB)
    page.text(host_line(machine), SUB)
    for other in machine.devices:
        if other.type != "cpu" and other.name != device.name:
            page.text(f"Not looked at here: {device_line(other)}", QUIET)
    page.y += 12
    for text in report.outlook[:2]:
        page.text(text, NAME)
    for text in (*report.outlook[2:], *report.remarks):
        page.text(scrub(text), NOTE)
    page.y += 18
    rows = _rows(report)
    left = page.columns(rows)
    page.items += [Letters(x, page.y, head, HEAD) for x, head in zip(left, _HEADS, strict=True)]
    page.y += line_height(HEAD) + 4
    page.items.append(Box(_EDGE, page.y, WIDTH - 2 * _EDGE, 2, RULE))
    page.y += 8
    groups: list[list[_Row]] = []
    for row in rows:
        same = groups and groups[-1][0].notes == row.notes and groups[-1][0].colour == row.colour and row.notes
        groups[-1].append(row) if same else groups.append([row])
    for number, group in enumerate(groups):
        page.group(group, left, stripe=number % 2 == 0)
    page.y += 14
    timed = dict.fromkeys(one.verdict.timed for one in report.diagnoses if one.verdict.timed)
    page.text(f"Time: the fastest of five calls; {' or '.join(timed)}." if timed else "", QUIET)
    page.text("Error: relative L2, against float32. Every kernel was run in a child process of its own.", QUIET)
    page.text("ComfyUI-Attune, Attention Doctor", QUIET)
    return Drawing(WIDTH, round(page.y + _EDGE - 10), page.items)
