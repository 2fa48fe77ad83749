"""A sheet of texts, boxes, marks and pixels, painted by matplotlib. Places are in pixels, from the upper left corner.

Figure and canvas are our own: no pyplot, and nothing that another pack set for matplotlib reaches what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

PAPER = "#FFFFFF"
INK = "#1F2328"
QUIET = "#6A737D"


class Style(NamedTuple):
    """Letters: size in pixels, colour, weight."""

    size: float
    colour: str = INK
    bold: bool = False


@dataclass
class Letters:
    """A line of text; `x` is its left end, its middle or its right end by `align`, `y` its base line."""

    x: float
    y: float
    text: str
    style: Style
    align: str = "left"


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    colour: str


class Mark(NamedTuple):
    """A sign of matplotlib ("x", "v") in the middle of `x`, `y`."""

    x: float
    y: float
    sign: str
    size: float


class Pixels(NamedTuple):
    """A picture (height, width, 3), uint8, with its upper left corner at `x`, `y`."""

    x: int
    y: int
    data: Any


def legible(text: str) -> str:
    """`text` with "?" for what the letters here may lack: matplotlib would warn about each."""
    return "".join(letter if letter.isprintable() and ord(letter) < 0x250 else "?" for letter in text)


class Sheet:
    """What is drawn, and how wide letters are. Raises ImportError where matplotlib is not installed."""

    def __init__(self, width: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties

        self.width = width
        self.items: list[Letters | Box | Mark | Pixels] = []
        self._canvas, self._figure, self._properties = FigureCanvasAgg, Figure, FontProperties
        self._renderer = FigureCanvasAgg(Figure(figsize=(1, 1), dpi=72)).get_renderer()  # at 72 dpi a point is a pixel
        self._fonts: dict[Style, Any] = {}

    def _font(self, style: Style) -> Any:
        if style not in self._fonts:
            weight = "bold" if style.bold else "normal"
            self._fonts[style] = self._properties(
                family="DejaVu Sans", weight=weight, size=style.size, style="normal", variant="normal", stretch="normal"
            )
        return self._fonts[style]

    def measure(self, text: str, style: Style) -> float:
        """The width of a line in pixels."""
        told = legible(text)
        return float(self._renderer.get_text_width_height_descent(told, self._font(style), ismath=False)[0])

    def text(self, x: float, y: float, text: str, style: Style, align: str = "left") -> None:
        self.items.append(Letters(x, y, legible(text), style, align))

    def lines(self, text: str, style: Style, width: float, most: int = 100) -> list[str]:
        """`text` in lines of at most `width` pixels; the last of `most` lines ends in dots where more would follow."""
        lines: list[str] = []
        line = ""
        for word in text.split():
            while word:
                told = f"{line} {word}".strip()
                if self.measure(told, style) <= width:
                    line, word = told, ""
                elif line:
                    lines.append(line)
                    line = ""
                else:  # one word that is too long for a line
                    cut = next((n for n in range(len(word) - 1, 1, -1) if self.measure(word[:n], style) <= width), 1)
                    lines.append(word[:cut])
                    word = word[cut:]
        if line:
            lines.append(line)
        if len(lines) > most:
            last = lines[most - 1]
            while last and self.measure(f"{last} ...", style) > width:
                last = last[:-1]
            lines = [*lines[: most - 1], f"{last.rstrip()} ..."]
        return lines

    def paragraph(self, x: float, y: float, text: str, style: Style, width: float, most: int = 100) -> float:
        """Lines of text from `y` (the top) on; returns where the next may begin."""
        for line in self.lines(text, style, width, most):
            self.text(x, y + style.size, line, style)
            y += style.size * 1.4
        return y

    def paint(self, height: int) -> Any:
        """The picture: (height, width, 3), uint8."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Rectangle
        from matplotlib.transforms import IdentityTransform

        figure = self._figure(figsize=(self.width / 72, height / 72), dpi=72, facecolor=PAPER, edgecolor=PAPER)
        canvas, plain = self._canvas(figure), IdentityTransform()
        for order, item in enumerate(self.items):
            if isinstance(item, Letters):
                figure.text(
                    item.x,
                    height - item.y,
                    item.text,
                    transform=plain,
                    fontproperties=self._font(item.style),
                    color=item.style.colour,
                    ha=item.align,
                    va="baseline",
                    usetex=False,
                    parse_math=False,
                    zorder=order,
                )
            elif isinstance(item, Box):
                place = (item.x, height - item.y - item.height)
                box = Rectangle(place, item.width, item.height, facecolor=item.colour, edgecolor="none", linewidth=0)
                box.set(transform=plain, zorder=order, antialiased=False)
                figure.add_artist(box)
            elif isinstance(item, Mark):
                for colour, width in ((PAPER, item.size / 2), (INK, item.size / 4)):
                    figure.add_artist(
                        Line2D(
                            [item.x],
                            [height - item.y],
                            marker=item.sign,
                            markersize=item.size,
                            markeredgewidth=width,
                            markeredgecolor=colour,
                            markerfacecolor=INK,
                            linestyle="none",
                            transform=plain,
                            zorder=order,
                        )
                    )
            else:
                rows = item.data.shape[0]
                image = figure.figimage(item.data, item.x, height - item.y - rows, origin="upper")
                image.set_zorder(order)
        canvas.draw()
        return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()
