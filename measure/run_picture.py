"""The runs of a prompt as a picture: block × step coloured by kernel, a panel for each run, and figures beside it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from .heat_map import panels
from .palette import NOTHING, colour
from .run_cells import kernel_summary, title
from .run_text import HOW_TO_TIME, events_text, notes, percent
from .sheet import INK, PAPER, QUIET, Box, Pixels, Sheet, Style

log = logging.getLogger("attune")
WIDTH = 1600
_EDGE = 44
_LEFT = 956  # width of the panels' side
_SIDE = _EDGE + _LEFT + 56  # where the figures begin
_TITLE, _HEAD, _BODY, _SMALL = Style(30, bold=True), Style(18, bold=True), Style(16), Style(14, QUIET)
_NAME = Style(15, bold=True)
_PLAIN = (
    "The picture of this report needs matplotlib, which is not installed in ComfyUI's Python.\n"
    "Install it with:  python -m pip install matplotlib   (no restart is needed)\n"
    "The text of the report is complete without it."
)


def scrub(text: str) -> str:
    """`text` without the folders of paths: they may name the user, and pictures get posted."""
    return re.sub(r"(?:[A-Za-z]:|~|\.\.?)?[\\/](?:[^\\/\s:'\"]+[\\/])+", ".../", text)


@dataclass
class _Total:
    """One kernel over all runs."""

    calls: int = 0
    discarded: int = 0
    seconds: float = 0.0
    timed: bool = False
    samples: int = 0
    mean: float = 0.0
    largest: float = 0.0


def _totals(runs: Sequence[dict[str, Any]]) -> dict[str, _Total]:
    totals: dict[str, _Total] = {}
    for run in runs:
        for name, kernel in run["kernels"].items():
            total = totals.setdefault(name, _Total())
            total.calls += kernel["calls"]
            total.discarded += kernel["discarded"]
            if kernel["seconds"] is not None:
                total.seconds, total.timed = total.seconds + kernel["seconds"], True
            error = kernel["error"]
            if error and error["samples"]:
                total.samples += error["samples"]
                total.mean += (error["mean_l1"] - total.mean) * error["samples"] / total.samples
                total.largest = max(total.largest, error["largest_l1"])
    return dict(sorted(totals.items(), key=lambda item: -item[1].calls))


def _figures(sheet: Sheet, runs: Sequence[dict[str, Any]], y: float) -> float:
    """The table of kernels: calls, share of attention time, error."""
    x, right = _SIDE, WIDTH - _EDGE
    totals = _totals(runs)
    in_all = sum(total.seconds for total in totals.values())
    sheet.text(x, y + 15, "kernel", _SMALL)
    sheet.text(x + 306, y + 15, "calls", _SMALL, "right")
    sheet.text(x + 320, y + 15, "time", _SMALL)
    sheet.text(right, y + 15, "error", _SMALL, "right")
    y += 26
    for name, total in list(totals.items())[:12]:
        sheet.items.append(Box(x, y + 1, 18, 18, colour(name)))
        sheet.text(x + 27, y + 15, name, _NAME)
        sheet.text(x + 306, y + 15, f"{total.calls:,}", _BODY, "right")
        if total.timed and in_all > 0:
            share = total.seconds / in_all
            sheet.items.append(Box(x + 320, y + 20, 62, 5, NOTHING))
            sheet.items.append(Box(x + 320, y + 20, max(1, round(62 * share)), 5, colour(name)))
            sheet.text(x + 320, y + 15, percent(share), _BODY)
        else:
            sheet.text(x + 320, y + 15, "-", _SMALL)
        error = f"{total.mean:.1g} / {total.largest:.1g}" if total.samples else "-"
        sheet.text(right, y + 15, error, Style(14) if total.samples else _SMALL, "right")
        y += 36
    if len(totals) > 12:
        y = sheet.paragraph(x, y, f"and {len(totals) - 12} more, in the text", _SMALL, right - x)
    samples = sum(total.samples for total in totals.values())
    said = [f"Time: share of the attention time of {sum(run['forwards'] for run in runs):,} forwards."]
    if not any(run["timed"] for run in runs):
        said = [f"Time was not measured: {HOW_TO_TIME}."]
    if samples:
        said.append(f"Error: relative L1 against float32, mean / largest of {samples:,} calls that were compared.")
    return sheet.paragraph(x, y + 4, " ".join(said), _SMALL, right - x)


def _findings(sheet: Sheet, runs: Sequence[dict[str, Any]], remarks: Sequence[str], y: float) -> None:
    """What is to be said below the table, as far as there is room for it."""
    x, width = _SIDE, WIDTH - _EDGE - _SIDE

    def section(head: str, texts: Sequence[str], most: int) -> None:
        nonlocal y
        if texts:
            y += 20
            sheet.text(x, y + 18, head, _HEAD)
            y += 32
            for text in texts[:most]:
                y = sheet.paragraph(x, y, scrub(text), _BODY, width, 4) + 6
            if len(texts) > most:
                y = sheet.paragraph(x, y, f"and {len(texts) - most} more, in the text", _SMALL, width)

    happened = [line for run in runs for line in events_text(run)]
    repeated = sum(run["repeated"] for run in runs)
    section("Asked for", list(dict.fromkeys(rule["words"] for run in runs for rule in run["policy"])), 4)
    refused: Counter[str] = Counter()
    for plan in (plan for run in runs for plan in run["plans"] if not plan["requested"].startswith("auto")):
        for one in plan["refused"]:
            refused[f"{one['kernel']}: {'; '.join(one['reasons'])}"] += plan["calls"]
    section("Not used", [f"{text} (×{count:,})" for text, count in refused.most_common() if count], 3)
    section("What happened", happened, 4)
    section("Notes", [*remarks, *dict.fromkeys(note for run in runs for note in notes(run))], 3)
    if runs and not happened and not repeated and all(run["status"] == "finished" for run in runs):
        section("Health", ["No forward had to be repeated, and no kernel was given up."], 1)


def _heads(runs: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """The title and the two lines below it."""
    if not runs:
        return "Attention Report", "", ""
    devices = dict.fromkeys(
        "CPU" if one["name"] == "cpu" else one["title"] for run in runs for one in run["machine"]["devices"]
    )
    models = dict.fromkeys(run["model"] for run in runs)
    blocks = max((run.get("blocks") or 0 for run in runs), default=0)
    tokens = max(run["tokens"] for run in runs)
    parts = [
        f"{tokens:,} tokens" if tokens else "",
        f"{blocks} blocks" if blocks else "",
        f"{len(runs)} sampling runs" if len(runs) > 1 else title(runs[0]),
        f"torch {runs[0]['machine']['torch']}",
        f"{sum(run.get('seconds', 0) for run in runs):.1f} s",
    ]
    return (
        f"{', '.join(models)} on {', '.join(devices)}",
        "  ·  ".join(part for part in parts if part),
        kernel_summary(runs),
    )


def draw(runs: Sequence[dict[str, Any]], remarks: Sequence[str] = ()) -> tuple[Sheet, int]:
    """The sheet and its height."""
    sheet = Sheet(WIDTH)
    head, facts, kernels = _heads(runs)
    y = sheet.paragraph(_EDGE, 36, head, _TITLE, WIDTH - 2 * _EDGE, 2)
    y = sheet.paragraph(_EDGE, y, facts, Style(18, QUIET), WIDTH - 2 * _EDGE, 1)
    y = sheet.paragraph(_EDGE, y + 2, kernels, Style(20), WIDTH - 2 * _EDGE, 2)
    top = int(y) + 22
    if runs:
        sheet.items.append(Box(_EDGE, top - 6, WIDTH - 2 * _EDGE, 2, NOTHING))
        panels(sheet, runs, _EDGE, top + 12, _LEFT)
        _findings(sheet, runs, remarks, _figures(sheet, runs, top + 12))
    else:
        for text in remarks:
            y = sheet.paragraph(_EDGE, y + 14, scrub(text), Style(18), WIDTH - 2 * _EDGE)
    ends = [_end(item) for item in sheet.items]
    height = int(max(ends)) + 56
    sheet.text(WIDTH - _EDGE, height - 22, "ComfyUI-Attune, Attention Report", _SMALL, "right")
    return sheet, height


def _end(item: Any) -> float:
    """How far down an item reaches."""
    if isinstance(item, Pixels):
        return float(item.y + item.data.shape[0])
    return float(item.y + (item.height if isinstance(item, Box) else 6))


def _plain(runs: Sequence[dict[str, Any]], remarks: Sequence[str]) -> Any:
    """What can be shown without matplotlib: which kernels ran, and what to install."""
    from PIL import Image, ImageDraw, ImageFont

    text = "\n".join(["Attention Report", *_heads(runs)[:1], kernel_summary(runs), *map(scrub, remarks), "", _PLAIN])
    image = Image.new("RGB", (1200, 60 + 26 * (text.count("\n") + 1)), PAPER)
    font = ImageFont.load_default(20)
    ImageDraw.Draw(image).multiline_text((30, 24), text, fill=INK, font=font, spacing=6)
    return numpy.array(image)


def picture(runs: Sequence[dict[str, Any]], remarks: Sequence[str] = ()) -> Any:
    """The runs of a prompt as a picture: (H, W, 3), uint8. `remarks` are said where there is no run, or beside them."""
    try:
        sheet, height = draw(runs, remarks)
    except ImportError as error:
        log.debug("The picture of a report is drawn without matplotlib (%s)", error)
        return _plain(runs, remarks)
    return sheet.paint(height)
