"""Paint a Drawing: with matplotlib, or with Pillow where matplotlib is not installed. Nothing global is touched."""

from __future__ import annotations

import logging
from typing import Any

import numpy

from .picture import PAPER, Box, Drawing, Style, draw
from .report import Report

log = logging.getLogger("attune")

# Fonts with the letters that DejaVu does not have, as Windows, Linux and macOS bring them.
_FURTHER = ("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC")
_FILES = {
    "plain": ("segoeui.ttf", "arial.ttf", "DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf"),
    "bold": ("segoeuib.ttf", "arialbd.ttf", "DejaVuSans-Bold.ttf", "LiberationSans-Bold.ttf", "Arial Bold.ttf"),
    "code": ("consola.ttf", "cour.ttf", "DejaVuSansMono.ttf", "LiberationMono-Regular.ttf", "Courier New.ttf"),
}


class Matplotlib:
    """Letters of DejaVu, which matplotlib brings. Figure and canvas are our own: no pyplot, no back end is chosen."""

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties, fontManager, get_font

        self._canvas, self._figure, self._properties = FigureCanvasAgg, Figure, FontProperties
        self._open = lambda family: get_font(fontManager.findfont(FontProperties(family=family)))
        there = {font.name for font in fontManager.ttflist}
        self._further = [name for name in _FURTHER if name in there]
        self._renderer = FigureCanvasAgg(Figure(figsize=(1, 1), dpi=72)).get_renderer()  # at 72 dpi a point is a pixel
        self._fonts: dict[Style, Any] = {}
        self._letters: set[int] = set()

    def _font(self, style: Style) -> Any:
        if style not in self._fonts:
            family = ["DejaVu Sans Mono" if style.cut == "code" else "DejaVu Sans", *self._further]
            weight = "bold" if style.cut == "bold" else "normal"
            self._fonts[style] = self._properties(family=family, weight=weight, size=style.size * 0.86, style="normal")
        return self._fonts[style]

    def _legible(self, text: str) -> str:
        """`text` with a mark for each letter that no font here has: matplotlib would warn about each."""
        if text.isascii():
            return text
        if not self._letters:  # the monospaced letters are the fewest
            self._letters.update(*(self._open(name).get_charmap() for name in ("DejaVu Sans Mono", *self._further)))
        return "".join(letter if ord(letter) in self._letters else "?" for letter in text)

    def measure(self, text: str, style: Style) -> float:
        told = self._legible(text)
        return float(self._renderer.get_text_width_height_descent(told, self._font(style), ismath=False)[0])

    def paint(self, drawing: Drawing) -> numpy.ndarray:
        from matplotlib.patches import FancyBboxPatch
        from matplotlib.transforms import IdentityTransform

        figure = self._figure(figsize=(drawing.width / 72, drawing.height / 72), dpi=72, facecolor=PAPER)
        canvas, top = self._canvas(figure), drawing.height
        for item in drawing.items:
            if isinstance(item, Box):
                style = f"round,pad=0,rounding_size={item.radius}" if item.radius else "square,pad=0"
                place, y = item.x, top - item.y - item.height
                box = FancyBboxPatch((place, y), item.width, item.height, boxstyle=style, linewidth=0)
                box.set(facecolor=item.colour, edgecolor="none", transform=IdentityTransform())
                figure.add_artist(box)
            elif item.text:
                figure.text(
                    item.x,
                    top - item.y - item.style.size,
                    self._legible(item.text),
                    transform=IdentityTransform(),
                    fontproperties=self._font(item.style),
                    color=item.style.colour,
                    va="baseline",
                    ha="left",
                    usetex=False,
                    parse_math=False,
                )
        canvas.draw()
        return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


class Pillow:
    """Letters of the system, else the one font that Pillow brings."""

    def __init__(self) -> None:
        self._fonts: dict[Style, Any] = {}

    def _font(self, style: Style) -> Any:
        if style not in self._fonts:
            self._fonts[style] = self._load(style.cut, style.size * 0.9)
        return self._fonts[style]

    @staticmethod
    def _load(cut: str, size: float) -> Any:
        from PIL import ImageFont

        for name in _FILES[cut]:
            try:
                return ImageFont.truetype(name, size)
            except OSError:  # not on this system
                continue
        return ImageFont.load_default(size)

    def measure(self, text: str, style: Style) -> float:
        return float(self._font(style).getlength(text))

    def paint(self, drawing: Drawing) -> numpy.ndarray:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (drawing.width, drawing.height), PAPER)
        pen = ImageDraw.Draw(image)
        for item in drawing.items:
            if isinstance(item, Box):
                ends = (item.x, item.y, item.x + item.width, item.y + item.height)
                pen.rounded_rectangle(ends, item.radius, fill=item.colour)
            else:
                base = (item.x, item.y + item.style.size)
                pen.text(base, item.text, fill=item.style.colour, font=self._font(item.style), anchor="ls")
        return numpy.array(image)


def picture(report: Report) -> numpy.ndarray:
    """The report as a picture: (H, W, 3), uint8."""
    for brush in (Matplotlib, Pillow):
        try:
            painter = brush()
            return painter.paint(draw(report, painter.measure))
        except Exception as error:  # not installed, or broken: the other one can do it too
            if brush is Pillow:
                raise
            log.debug("The doctor's picture is not painted with matplotlib (%s: %s)", type(error).__name__, error)
    raise AssertionError
