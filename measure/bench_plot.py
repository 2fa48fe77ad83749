"""A benchmark's result as a picture: bars of speed by shape, and speed against error. Needs matplotlib.

Figure and canvas are our own: no pyplot, no window, no settings of others.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench_table import device_text, machine_text, speed_text
from .palette import colour
from .sheet import INK, PAPER, QUIET, legible

HOW_TO_INSTALL = (
    "The picture needs matplotlib, which is not installed in this Python. Install it with:  "
    "python -m pip install matplotlib   (the table, --json and --csv need nothing more)"
)
_GRID = "#E3E6EA"
_DTYPE_MARKS = ("o", "s", "^", "D")
_MOST_LABELLED = 44  # bars of one panel that have their number written on them; of more, each shape's fastest
_MOST_SHAPES = 8  # of one panel
_LEGEND_COLUMNS = 6
_LEAST_ERROR = 1e-8  # what is drawn where an output equals float32 in all digits
# Inches. Above and below are a panel's title and the labels of its axis.
_WIDTH, _LEFT, _RIGHT, _ABOVE, _BELOW, _FOOT = 12.0, 0.88, 0.3, 0.5, 0.85, 0.32
_BARS, _POINTS, _DPI = 3.2, 4.4, 130

Row = Mapping[str, Any]


def save_plot(result: Mapping[str, Any], path: Path, source: str = "") -> None:
    """Write the picture; the kind of file is told by the name's end. Raises ImportError, OSError or ValueError.

    source: where the figures can be read, for the foot of the picture.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["status"] == "measured"]
    if not rows:
        raise ValueError("nothing was measured, so there is nothing to draw")
    right = [row for row in rows if row["verdict"] == "works" and row["l2"] is not None]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    panels = list(_panels(rows))
    head = 1.2 + 0.25 * -(-(len(kernels) + (len(right) < len(rows))) // _LEGEND_COLUMNS)
    height = head + len(panels) * (_ABOVE + _BARS + _BELOW) + bool(right) * (_ABOVE + _POINTS + 0.65) + _FOOT
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings = {"font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": _GRID, "hatch.linewidth": 1.5}
        # A dollar sign in a name is a dollar sign.
        matplotlib.rcParams.update({**settings, "text.parse_math": False})
        figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor=PAPER)
        FigureCanvasAgg(figure)
        top = height - head

        def panel(tall: float, below: float) -> Any:
            nonlocal top
            top -= _ABOVE + tall + below
            sizes = _LEFT / _WIDTH, (top + below) / height, 1 - (_LEFT + _RIGHT) / _WIDTH, tall / height
            return figure.add_axes(sizes)

        for dtype, members in panels:
            _bars(panel(_BARS, _BELOW), members, dtype, result.get("peak_tflops", {}).get(dtype))
        if right:
            _speed_against_error(panel(_POINTS, 0.65), right)
        left, right_end = _LEFT / _WIDTH, 1 - _RIGHT / _WIDTH
        figure.text(left, 1 - 0.42 / height, legible(_title(result)), fontsize=17, weight="bold", va="center")
        figure.text(left, 1 - 0.76 / height, legible(_facts(result)), fontsize=11, color=QUIET, va="center")
        figure.legend(
            handles=_keys(kernels, len(right) < len(rows)), loc="upper left", ncols=_LEGEND_COLUMNS, frameon=False,
            bbox_to_anchor=(left, 1 - 1.08 / height), borderaxespad=0, borderpad=0, fontsize=10.5, columnspacing=1.6,
        )  # fmt: skip
        foot = ", ".join(filter(None, ("ComfyUI-Attune, attune bench", legible(source))))
        figure.text(right_end, 0.14 / height, foot, fontsize=9.5, color=QUIET, ha="right")
        figure.savefig(path)


def _title(result: Mapping[str, Any]) -> str:
    return f"Attention kernels on {device_text(result['machine'])}"


def _facts(result: Mapping[str, Any]) -> str:
    told = machine_text(result["machine"]).removeprefix(device_text(result["machine"])).lstrip(", ")
    broken = f"incomplete: {result['interrupted']}" if result.get("interrupted") else ""
    return ", ".join(filter(None, (told, str(result.get("started", ""))[:10], broken)))


def _keys(kernels: Sequence[str], wrong: bool) -> list[Any]:
    from matplotlib.patches import Patch

    keys = [Patch(facecolor=colour(kernel), label=legible(kernel)) for kernel in kernels]
    if wrong:
        keys.append(Patch(facecolor=QUIET, hatch="////", edgecolor=PAPER, linewidth=0, label="wrong numbers"))
    return keys


def _panels(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each group of bars: a data type, and not too many shapes, short cross attention apart from long."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        members = [row for row in rows if row["dtype"] == dtype]
        shapes = list(dict.fromkeys(row["shape"] for row in members))
        if len(shapes) > _MOST_SHAPES:
            shapes.sort(key=lambda shape: shape.endswith(" cross"))
        count = -(-len(shapes) // _MOST_SHAPES)
        for part in range(count):
            here = shapes[part * len(shapes) // count : (part + 1) * len(shapes) // count]
            yield dtype, [row for shape in here for row in members if row["shape"] == shape]


def _plain_axes(axes: Any, title: str, remark: str = "") -> None:
    axes.set_facecolor(PAPER)
    axes.tick_params(which="both", length=0, labelsize=10, labelcolor=INK)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=13, weight="bold", pad=12)
    axes.set_title(remark, loc="right", fontsize=10, color=QUIET, pad=12)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _bars(axes: Any, rows: Sequence[Row], dtype: str, peak: float | None) -> None:
    """TFLOP/s in groups by shape, the kernels of a group in the order of the legend; whiskers are the quartiles."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    width = 0.86 / max(sum(row["shape"] == shape for row in rows) for shape in shapes)
    fastest = max(row["tflops"] * row["median_ms"] / row["low_ms"] for row in rows)
    for number, shape in enumerate(shapes):
        here = [row for row in rows if row["shape"] == shape]
        first = max(here, key=lambda row: row["tflops"] * (row["verdict"] == "works"))
        for place, row in enumerate(here):
            x = number + (place - (len(here) - 1) / 2) * width
            speed = row["tflops"]
            wrong = row["verdict"] != "works"
            axes.bar(
                x, speed, width * 0.92, color=colour(row["kernel"]), hatch="////" if wrong else None,
                edgecolor=PAPER if wrong else "none", linewidth=0,
            )  # fmt: skip
            low, high = (speed * row["median_ms"] / row[name] for name in ("high_ms", "low_ms"))
            axes.vlines(x, low, high, color=INK, linewidth=1.1)
            if len(rows) <= _MOST_LABELLED or row is first:
                axes.text(
                    x, max(high, speed) + fastest * 0.012, speed_text(speed), ha="center", va="bottom", fontsize=9,
                )  # fmt: skip
    near = peak if peak and peak < 2.5 * fastest else 0.0
    if near:
        axes.axhline(near, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
    axes.set_ylim(0, 1.1 * max(fastest, near))
    axes.set_xlim(-0.55, len(shapes) - 0.45)
    told = f"{'dashed: ' if near else ''}a matrix product at best, {speed_text(peak)} TFLOP/s" if peak else ""
    _plain_axes(axes, f"Speed by shape, {dtype} (taller is faster)", told)
    axes.set_xticks(range(len(shapes)), [_shape_label(shape, rows, len(shapes)) for shape in shapes])
    axes.tick_params(axis="x", pad=6)
    axes.yaxis.grid(color=_GRID, linewidth=0.8)
    axes.set_ylabel("TFLOP/s", fontsize=11)


def _shape_label(shape: str, rows: Sequence[Row], shapes: int) -> str:
    row = next(row for row in rows if row["shape"] == shape)
    lines = textwrap.wrap(legible(shape), 130 // shapes, break_long_words=False)
    return "\n".join([*lines, f"{row['q_len']:,} x {row['kv_len']:,}"])


def _speed_against_error(axes: Any, rows: Sequence[Row]) -> None:
    """A small point for each row, a large one with its name in the middle of each kernel's: right is more exact."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    marks = {dtype: _DTYPE_MARKS[place % len(_DTYPE_MARKS)] for place, dtype in enumerate(dtypes)}
    best: dict[Any, float] = {}  # kernels are compared within one shape
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        best[row["shape"]] = max(best.get(row["shape"], 0.0), row["tflops"])
    for row in rows:
        point = (max(row["l2"], _LEAST_ERROR), row["tflops"] / best[row["shape"]])
        points.setdefault((row["kernel"], row["dtype"]), []).append(point)
    middles = []
    for (kernel, dtype), those in points.items():
        style = {"marker": marks[dtype], "color": colour(kernel), "linestyle": "none"}
        errors, speeds = zip(*those, strict=True)
        axes.plot(errors, speeds, markersize=5, alpha=0.6, markeredgecolor=QUIET, markeredgewidth=0.4, **style)
        middles.append((kernel, statistics.median(errors), statistics.median(speeds)))
        axes.plot(*middles[-1][1:], markersize=12, markeredgecolor=PAPER, markeredgewidth=1, zorder=3, **style)
    shown = [error for those in points.values() for error, _ in those]
    axes.set_xscale("log")
    axes.set_xlim(max(shown) * 1.8, min(shown) / 2.6)  # turned round: better is right
    axes.set_ylim(0, 1.12)
    _plain_axes(axes, "Speed against error (best: top right)", "small points: single shapes; large ones: their median")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if max(shown) > 100 * min(shown) else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _place: f"{value:.0e}".replace("e-0", "e-"))
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:.0%}" if value <= 1.0001 else "")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_ylabel("speed, of the fastest for the shape", fontsize=11)
    axes.set_xlabel("relative L2 error against float32 (to the right: more exact)", fontsize=11)
    if len(dtypes) > 1:
        keys = [Line2D([], [], marker=marks[dtype], color=QUIET, linestyle="none", label=dtype) for dtype in dtypes]
        axes.legend(handles=keys, loc="lower left", edgecolor=_GRID)
    _names(axes, middles)


def _names(axes: Any, middles: Sequence[tuple[str, float, float]]) -> None:
    """A name at each large point: beside it where there is room, else further away with a line to it."""
    from matplotlib.font_manager import FontProperties

    font, renderer = FontProperties(family="DejaVu Sans", size=9.5), axes.figure.canvas.get_renderer()
    point = axes.figure.dpi / 72
    places = [axes.transData.transform(middle[1:]) for middle in middles]
    taken = [(x - 7 * point, y - 7 * point, x + 7 * point, y + 7 * point) for x, y in places]
    edge = axes.bbox
    steps = [(side, 13 * up) for far in range(30) for up in (far, -far) for side in (1, -1)]
    for place in sorted(range(len(places)), key=lambda place: -places[place][1]):
        (x, y), name = places[place], legible(middles[place][0])
        wide = renderer.get_text_width_height_descent(name, font, False)[0]
        for side, up in steps:
            start = x + side * 11 * point - (wide if side < 0 else 0)
            box = (start, y + (up - 6) * point, start + wide, y + (up + 6) * point)
            inside = edge.x0 < box[0] and box[2] < edge.x1 and edge.y0 < box[1] and box[3] < edge.y1
            if inside and not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            ):
                break
        else:
            continue  # a panel that is full of names: the colours tell the rest
        taken.append(box)
        axes.annotate(
            name, middles[place][1:], xytext=(side * 11, up), textcoords="offset points", va="center", fontsize=9.5,
            ha="left" if side > 0 else "right", zorder=4,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5, "alpha": 0.7},
            arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.6} if up else None,
        )  # fmt: skip
