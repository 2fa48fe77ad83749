"""A benchmark's result as a picture: bars of speed by shape, and speed against error. Needs matplotlib.

Figure and canvas are our own: no pyplot, no window, no settings of others.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench_table import device_text, machine_text, speed_text
from .palette import colour
from .sheet import INK, PAPER, QUIET

HOW_TO_INSTALL = (
    "The picture needs matplotlib, which is not installed in this Python. Install it with:  "
    "python -m pip install matplotlib   (the table, --json and --csv need nothing more)"
)
_GRID = "#E3E6EA"
_DTYPE_MARKS = ("o", "s", "^", "D")
_MOST_LABELLED = 44  # bars of one panel that have their number written on them
_LEAST_ERROR = 1e-8  # what is drawn where an output equals float32 in all digits

Row = Mapping[str, Any]


def save_plot(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the kind of file is told by the name's end. Raises ImportError, OSError or ValueError."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["status"] == "measured"]
    if not rows:
        raise ValueError("nothing was measured, so there is nothing to draw")
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": _GRID})
        height = 2.65 + 5.2 * len(dtypes) + 4.6
        figure = Figure(figsize=(14, height), dpi=110, facecolor=PAPER)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            len(dtypes) + 1,
            1,
            height_ratios=[*[4.3] * len(dtypes), 4.6],
            left=0.065,
            right=0.975,
            top=1 - 1.45 / height,
            bottom=1.2 / height,
            hspace=0.4,
        )
        for place, dtype in enumerate(dtypes):
            peak = result.get("peak_tflops", {}).get(dtype)
            _bars(figure.add_subplot(grid[place]), [row for row in rows if row["dtype"] == dtype], dtype, peak)
        _speed_against_error(figure.add_subplot(grid[len(dtypes)]), rows, dtypes)
        inch = 1 / height
        figure.text(0.065, 1 - 0.42 * inch, _title(result), fontsize=17, weight="bold", va="center")
        figure.text(0.065, 1 - 0.74 * inch, _facts(result), fontsize=11, color=QUIET, va="center")
        figure.legend(
            handles=[_key(kernel) for kernel in kernels],
            loc="lower left",
            bbox_to_anchor=(0.058, 0.1 * inch),
            ncols=min(len(kernels), 7),
            frameon=False,
            fontsize=10.5,
        )
        figure.text(0.975, 0.12 * inch, "ComfyUI-Attune, attune bench", fontsize=9.5, color=QUIET, ha="right")
        figure.savefig(path)


def _title(result: Mapping[str, Any]) -> str:
    return f"Attention kernels on {device_text(result['machine'])}"


def _facts(result: Mapping[str, Any]) -> str:
    told = machine_text(result["machine"]).removeprefix(device_text(result["machine"])).lstrip(", ")
    return f"{told}, {str(result.get('started', ''))[:10]}".rstrip(", ")


def _key(kernel: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour(kernel), label=kernel)


def _plain_axes(axes: Any) -> None:
    axes.set_facecolor(PAPER)
    axes.tick_params(length=0, labelsize=10)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _bars(axes: Any, rows: Sequence[Row], dtype: str, peak: float | None) -> None:
    """TFLOP/s in groups by shape, the kernels of a group in the order of the legend; whiskers are the quartiles."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    by_place = {(row["shape"], row["kernel"]): row for row in rows}
    width = 0.84 / len(kernels)
    fastest = max(row["tflops"] * row["median_ms"] / row["low_ms"] for row in rows)
    for number, shape in enumerate(shapes):
        here = [kernel for kernel in kernels if (shape, kernel) in by_place]
        for place, kernel in enumerate(here):
            row = by_place[shape, kernel]
            x = number + (place - (len(here) - 1) / 2) * width
            speed = row["tflops"]
            wrong = row["verdict"] != "works"
            axes.bar(
                x, speed, width * 0.92, color=colour(kernel), hatch="////" if wrong else None,
                edgecolor=PAPER if wrong else "none", linewidth=0,
            )  # fmt: skip
            low, high = (speed * row["median_ms"] / row[name] for name in ("high_ms", "low_ms"))
            axes.vlines(x, low, high, color=INK, linewidth=1.1)
            if len(rows) <= _MOST_LABELLED:
                axes.text(
                    x, max(high, speed) + fastest * 0.012, speed_text(speed), ha="center", va="bottom",
                    fontsize=9, color=INK,
                )  # fmt: skip
    if peak and peak < 2.5 * fastest:
        axes.axhline(peak, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
        axes.text(
            0.998, peak + 0.01 * fastest, "matrix product, at best", ha="right", va="bottom", fontsize=9, color=QUIET,
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.set_ylim(0, 1.1 * max(fastest, peak if peak and peak < 2.5 * fastest else 0))
    axes.set_xlim(-0.55, len(shapes) - 0.45)
    _plain_axes(axes)
    narrow = len(shapes) > 8
    axes.set_xticks(range(len(shapes)), [_shape_label(shape, rows, narrow) for shape in shapes])
    axes.tick_params(axis="x", labelsize=8 if narrow else 10)
    axes.yaxis.grid(color=_GRID, linewidth=0.8)
    axes.set_ylabel("TFLOP/s", fontsize=11)
    axes.set_title(f"Speed by shape, {dtype} (taller is faster)", loc="left", fontsize=13, weight="bold")


def _shape_label(shape: str, rows: Sequence[Row], narrow: bool) -> str:
    row = next(row for row in rows if row["shape"] == shape)
    head, _, tail = shape.rpartition(" ")
    name = f"{head}\n{tail}" if head else shape
    return f"{name}\n{row['q_len']:,} x{chr(10) if narrow else ' '}{row['kv_len']:,}"


def _speed_against_error(axes: Any, rows: Sequence[Row], dtypes: Sequence[str]) -> None:
    """A small point for each row, a large one with its name in the middle of each kernel's: right is more exact."""
    best: dict[Any, float] = {}  # kernels are compared within one shape
    for row in rows:
        best[row["shape"]] = max(best.get(row["shape"], 0.0), row["tflops"])
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["l2"] is not None:
            point = (max(row["l2"], _LEAST_ERROR), row["tflops"] / best[row["shape"]])
            points.setdefault((row["kernel"], row["dtype"]), []).append(point)
    middles = {}
    for (kernel, dtype), those in points.items():
        mark = _DTYPE_MARKS[dtypes.index(dtype) % len(_DTYPE_MARKS)]
        errors, speeds = zip(*those, strict=True)
        axes.plot(errors, speeds, mark, markersize=5, color=colour(kernel), alpha=0.45, markeredgewidth=0)
        middle = middles[kernel, dtype] = statistics.median(errors), statistics.median(speeds)
        axes.plot(*middle, mark, markersize=12, color=colour(kernel), markeredgecolor=PAPER, markeredgewidth=1)
    axes.set_xscale("log")
    if points:
        shown = [error for those in points.values() for error, _ in those]
        axes.set_xlim(max(shown) * 1.8, min(shown) / 2.6)  # turned round: better is right
    axes.set_ylim(0, 1.12)
    _names(axes, middles, len(dtypes) > 1)
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:.0%}" if value <= 1.0001 else "")
    axes.grid(color=_GRID, linewidth=0.8, which="major")
    axes.set_ylabel("speed, of the fastest for the shape", fontsize=11)
    axes.set_xlabel("relative L2 error against float32 (to the right: more exact)", fontsize=11)
    title = "Speed against error (best: top right; small points: single shapes, large ones: their median)"
    axes.set_title(title, loc="left", fontsize=13, weight="bold")
    _plain_axes(axes)


def _names(axes: Any, middles: Mapping[tuple[str, str], tuple[float, float]], with_dtype: bool) -> None:
    """Names beside the large points, from the top down; one that would lie on another goes below it."""
    taken: list[tuple[float, float]] = []
    for (kernel, dtype), place in sorted(middles.items(), key=lambda item: -item[1][1]):
        x, y = axes.transData.transform(place)
        lower = y
        while any(abs(lower - other) < 17 and abs(x - beside) < 190 for beside, other in taken):
            lower -= 2
        taken.append((x, lower))
        text = f"{kernel}, {dtype}" if with_dtype else kernel
        axes.annotate(
            text, place, xytext=(11, (lower - y) * 72 / axes.figure.dpi), textcoords="offset points", va="center",
            fontsize=9.5, color=INK,
        )  # fmt: skip
