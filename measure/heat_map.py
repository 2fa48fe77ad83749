"""The heat map of one run: rows of blocks, columns of steps, each cell in the colour of the kernel that computed it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from .palette import NOTHING, colour, rgb
from .run_cells import step_cells, title
from .sheet import INK, PAPER, QUIET, Box, Mark, Pixels, Sheet, Style

_AXIS = 46  # room for the numbers of the blocks
_BODY, _SMALL = Style(16), Style(14, QUIET)
_TICK, _NAME = Style(13, QUIET), Style(15, bold=True)
_MOST_PANELS, _MOST_COLUMNS, _MOST_ROWS = 6, 200, 100


@dataclass
class Grid:
    """One run as rows of blocks and columns of steps; each may stand for several where there are very many.

    cells: (row, column) → kind → calls per kernel. `steps` and `blocks` name the columns and the rows.
    """

    steps: list[int]
    blocks: list[int | None]
    columns_of: int
    rows_of: int
    cells: dict[tuple[int, int], dict[str, Counter[str]]] = field(default_factory=dict)


def grid(run: dict[str, Any]) -> Grid:
    """The panel of a run, without sizes."""
    of_step = step_cells(run)
    numbers = [step["step"] for step in run["steps"]]
    first, last = min(numbers, default=0), max(numbers, default=0)
    known = [block for cells in of_step.values() for block, _ in cells if block is not None]
    unknown = any(block is None for cells in of_step.values() for block, _ in cells)
    count = max(run.get("blocks") or 0, max(known, default=-1) + 1) if known else 0
    columns_of, rows_of = -(-(last - first + 1) // _MOST_COLUMNS), max(1, -(-count // _MOST_ROWS))
    blocks: list[int | None] = list(range(0, count, rows_of))
    found = Grid(list(range(first, last + 1, columns_of)), blocks, columns_of, rows_of)
    if unknown or not count:
        found.blocks.append(None)
    for step, cells in of_step.items():
        for (block, kind), kernels in cells.items():
            row = len(found.blocks) - 1 if block is None else block // rows_of
            place = found.cells.setdefault((row, (step - first) // columns_of), {})
            place.setdefault(kind, Counter()).update(kernels)
    return found


def pixels(panel: Grid, wide: int, high: int) -> Any:
    """The heat map: each cell `wide` × `high` pixels with a thin gap.

    Where cross attention ran on another kernel than self attention, it is the lower edge of the cell.
    """
    image = numpy.full((len(panel.blocks) * high, len(panel.steps) * wide, 3), rgb(PAPER), dtype=numpy.uint8)
    gap = 1 if min(wide, high) > 5 else 0
    for row in range(len(panel.blocks)):
        for column in range(len(panel.steps)):
            kinds = panel.cells.get((row, column), {})
            shown = [kinds[kind].most_common(1)[0][0] for kind in sorted(kinds, reverse=True)]  # self, then cross
            top, left = row * high, column * wide
            inside = high - gap
            edge = top + (inside if len(set(shown)) < 2 else max(1, inside * 7 // 10))
            right = left + wide - gap
            image[top:edge, left:right] = rgb(colour(shown[0]) if shown else NOTHING)
            image[edge : top + inside, left:right] = rgb(colour(shown[-1]) if shown else NOTHING)
    return image


def _split(panels: Sequence[Grid]) -> bool:
    """Is there a cell in which self and cross attention ran on different kernels?"""
    return any(
        len({kernels.most_common(1)[0][0] for kernels in kinds.values()}) > 1
        for panel in panels
        for kinds in panel.cells.values()
    )


def _stride(count: int, size: float, wanted: float) -> int:
    """Every how many-th of `count` numbers is written, so that they stand `wanted` pixels apart at least."""
    return next((n for n in (1, 2, 5, 10, 20, 50, 100) if n * size >= wanted), max(1, count))


def _panel(sheet: Sheet, run: dict[str, Any], panel: Grid, x: int, y: int, wide: int, high: int, name: str) -> int:
    """One heat map with its axes; returns where it ends."""
    sheet.text(x, y + 15, name, _NAME)
    top = y + 44
    sheet.items.append(Pixels(x, top, pixels(panel, wide, high)))
    rows, columns = len(panel.blocks), len(panel.steps)
    bottom = top + rows * high
    every = _stride(rows, high, 17)
    for row, block in enumerate(panel.blocks):
        if block is None:
            sheet.text(x - 8, top + (row + 0.5) * high + 5, "all" if rows == 1 else "other", _TICK, "right")
        elif row % every == 0:
            sheet.text(x - 8, top + (row + 0.5) * high + 5, str(block), _TICK, "right")
    every = _stride(columns, wide, 36)
    for column, step in enumerate(panel.steps):
        if column % every == 0:
            sheet.text(x + (column + 0.5) * wide, bottom + 17, str(step), _TICK, "center")
    doubles = run.get("doubles") or 0
    if 0 < doubles < rows * panel.rows_of:
        sheet.items.append(Box(x, top + doubles / panel.rows_of * high - 1, columns * wide, 3, INK))

    def middle(step: int) -> float:
        return x + ((step - panel.steps[0]) // panel.columns_of + 0.5) * wide

    size = max(5, min(12, wide * 0.7))
    for step in run["steps"]:
        if step["discarded"]:
            sheet.items.append(Mark(middle(step["step"]), top - 9, "v", size))
    for event in run["events"]:
        if event["kind"] == "demotion" and event["step"] is not None:
            block, known = event["block"], panel.blocks[0] is not None
            place = top + (block // panel.rows_of + 0.5) * high if block is not None and known else top - 9
            sheet.items.append(Mark(middle(event["step"]), place, "x", min(size, max(5, high * 0.7))))
    return bottom + 24


def panels(sheet: Sheet, runs: Sequence[dict[str, Any]], left: int, y: int, width: int) -> int:
    """All heat maps, in lines of up to three, and what their signs mean; returns where they end."""
    shown = [run for run in runs if run["steps"]][:_MOST_PANELS]
    if not shown:
        return int(sheet.paragraph(left, y, "No forward pass of the model was seen.", _BODY, width))
    grids = [grid(run) for run in shown]
    high = max(6, min(46, 600 // max(len(panel.blocks) for panel in grids)))
    for per_line in (3, 2, 1):
        lines = [range(n, min(n + per_line, len(grids))) for n in range(0, len(grids), per_line)]
        room = width - per_line * (_AXIS + 16)
        wide = min(72, *(room // sum(len(grids[n].steps) for n in line) for line in lines))
        slots = [max(wide * len(panel.steps), 230) + _AXIS + 16 for panel in grids]
        if per_line == 1 or (wide >= 14 and all(sum(slots[n] for n in line) <= width for line in lines)):
            break
    wide = max(4, wide)
    sheet.text(left, y + 15, "block by step: the kernel that computed it", _SMALL)
    y += 32
    for line in lines:
        x, end = left + _AXIS, y
        for n in line:
            run = shown[n]
            name = f"{n + 1}. {title(run)}" if len(runs) > 1 else title(run)
            if run["status"] != "finished":
                name += f", {run['status']}"
            if len(runs) > 1 and run.get("sampler_node"):
                name += f" (node {run['sampler_node']})"
            end = max(end, _panel(sheet, run, grids[n], x, y, wide, high, name))
            x += slots[n]
        y = end + 14
    said = []
    if _split(grids):
        said.append("lower edge of a cell: cross attention, where it ran on another kernel")
    if any(step["discarded"] for run in shown for step in run["steps"]):
        said.append("triangle: a forward was thrown away and done again")
    if any(event["kind"] == "demotion" for run in shown for event in run["events"]):
        said.append("cross: a kernel was given up there")
    if any(run.get("doubles") for run in shown):
        said.append("line: double blocks above, single ones below")
    if len(runs) > len(shown):
        said.append(f"{len(runs) - len(shown)} more runs are in the text")
    return int(sheet.paragraph(left, y, "; ".join(said), _SMALL, width))
