"""JSON that is read and written again: what is not changed keeps its meaning and its look, numbers to the letter."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, TextIO

from ..measure.workflow_file import WorkflowError

LARGEST = 50_000_000  # bytes: a workflow of a thousand nodes has about two million
_DEEPEST = 200  # ComfyUI's own files stay below 20
_SURROGATE = re.compile("[\ud800-\udfff]")
# What moves a terminal's cursor, colours it or turns the text around.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class Verbatim(float):
    """A number that Python would write in other letters than the file has: 1.50, 1e5, one of a thousand digits."""

    text: str

    def __new__(cls, text: str) -> Verbatim:
        number = super().__new__(cls, text)
        number.text = text
        return number


@dataclass(frozen=True)
class Style:
    """How a file writes JSON: `indent` (None: in one line), what stands after commas and colons, letters escaped?"""

    indent: str | None = None
    comma: str = ", "
    colon: str = ": "
    ascii: bool = False
    newline: str = "\n"
    end: str = ""
    mark: str = ""  # U+FEFF, where the file begins with it


def say(text: str, to: TextIO | None = None) -> None:
    """Print one line: names in files and answers of servers are anybody's, and may hold what a terminal obeys."""
    print(_CONTROL.sub(lambda found: repr(found[0])[1:-1], text), file=to or sys.stdout, flush=to is not None)


def _float(text: str) -> float:
    number = float(text)
    return number if repr(number) == text else Verbatim(text)


def _int(text: str) -> float | int:
    if text == "-0" or len(text) > 400:  # Python has no such integer, or refuses to convert it
        return Verbatim(text)
    return int(text)


def depth(data: Any) -> int:
    """How deep lists and objects lie in each other; stops counting a little above what is taken."""
    deepest, left = 0, [(data, 1)]
    while left:
        value, level = left.pop()
        if isinstance(value, (dict, list)):
            deepest = max(deepest, level)
            if deepest > _DEEPEST:
                break
            left += [(one, level + 1) for one in (value.values() if isinstance(value, dict) else value)]
    return deepest


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON, and ComfyUI does not open it")


def loads(text: str, where: str, nan: Callable[[str], Any] = _no_number) -> Any:
    """The JSON of `text`. `where` names its source in the message. Raises WorkflowError.

    nan: what becomes of NaN and Infinity.
    """
    if not text.strip():
        raise WorkflowError(f"{where} is empty. Wanted: a workflow as ComfyUI saves it; save it there again")
    try:
        data = json.loads(text, parse_float=_float, parse_int=_int, parse_constant=nan)
    except RecursionError:
        data = None
    except ValueError as error:
        raise WorkflowError(
            f"{where} is no JSON, or it is cut off: {error}. Wanted: a workflow as ComfyUI saves "
            "it; save it there again"
        ) from None
    if data is None or depth(data) > _DEEPEST:
        raise WorkflowError(
            f"{where} is no workflow: wanted at most {_DEEPEST} lists and objects inside each other, "
            f"found {'nothing (null)' if data is None and text.strip() == 'null' else 'more'}"
        )
    return data


_LOOKED_AT = 1 << 20  # characters: every file shows its style in so many


def style_of(text: str) -> Style:
    """How `text`, which is JSON, is written."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    body = text[len(mark) :]
    lines = re.match(r"\s*[\[{]\r?\n([ \t]*)", body)
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', body[:_LOOKED_AT])  # what strings hold says nothing
    colon = re.search(r'"\s*:([ ]?)', outside)
    comma = re.search(r',([ ]?)["\d\[{tfnNI-]', outside)
    return Style(
        indent=lines[1] if lines else None,
        comma="," + (comma[1] if comma and not lines else ""),
        colon=":" + (colon[1] if colon else " "),
        ascii=body.isascii(),
        newline="\r\n" if lines and "\r\n" in lines[0] else "\n",
        end=body[len(body.rstrip()) :],
        mark=mark,
    )


def dumps(data: Any, style: Style) -> str:
    """`data` as JSON in that style."""
    parts: list[str] = []
    _write(data, style, style.newline, parts.append)
    return f"{style.mark}{''.join(parts)}{style.end}"


def _string(text: str, style: Style) -> str:
    if style.ascii:
        return encode_basestring_ascii(text)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", encode_basestring(text))


def _scalar(value: Any, style: Style) -> str:
    if isinstance(value, str):
        return _string(value, style)
    return value.text if isinstance(value, Verbatim) else json.dumps(value)


def _write(value: Any, style: Style, line: str, add: Callable[[str], Any]) -> None:
    """`line` ends a line and begins the next at the current depth."""
    if not isinstance(value, (dict, list)):
        add(_scalar(value, style))
        return
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    if not value:
        add(opening + closing)
        return
    inner = line if style.indent is None else line + style.indent
    between = style.comma if style.indent is None else f",{inner}"
    add(opening if style.indent is None else opening + inner)
    for number, one in enumerate(value):
        if number:
            add(between)
        if isinstance(value, dict):
            add(_string(one, style) + style.colon)
            one = value[one]
        _write(one, style, inner, add)
    add(closing if style.indent is None else line + closing)
