"""Workflows inside pictures and videos, as ComfyUI and VideoHelperSuite put them there, read without other packages.

PNG: the texts `workflow` and `prompt` (tEXt, zTXt, iTXt; `comf` in animated ones). WebP: texts of EXIF that begin with
these names. MP4: the keys of moov/udta/meta, or a comment with both. WebM: tags, or a comment with both.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..measure.workflow_file import WorkflowError
from .text import LARGEST

Texts = dict[str, str]  # "workflow", "prompt" and "comment" -> JSON
_NAMES = ("workflow", "prompt", "comment")
_LONGEST_NAME = 16  # with the colon behind it
_MOST_KEYS = 1_000_000  # bytes: an MP4's list of names


class _CutError(Exception):
    """The file ends in the middle of something."""


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise _CutError
    return data


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _wanted(found: Texts, name: str) -> bool:
    return name in _NAMES and name not in found


def _keep(found: Texts, name: str, data: bytes) -> None:
    name = name.strip("\0 ").lower()
    if _wanted(found, name):
        found[name] = _text(data).strip("\0 \n")


def _inflate(data: bytes) -> bytes:
    worker = zlib.decompressobj()
    try:
        text = worker.decompress(data, LARGEST)
    except zlib.error:
        raise _CutError from None
    if worker.unconsumed_tail:
        raise WorkflowError(f"its text is larger than {LARGEST // 1_000_000} MB: no workflow is that large")
    return text


def _png(file: BinaryIO, end: int, found: Texts) -> None:
    file.seek(8)
    while True:
        size, kind = struct.unpack(">I4s", _take(file, 8))
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"comf") and size <= LARGEST:
            key, _, data = _take(file, size).partition(b"\0")
            name = key.decode("latin-1").strip().lower()
            if not _wanted(found, name):
                data = b""  # others are not unpacked
            elif kind == b"zTXt":
                data = _inflate(data[1:])
            elif kind == b"iTXt":
                packed, rest = data[:1] == b"\1", data[2:].split(b"\0", 2)
                data = _inflate(rest[-1]) if packed else rest[-1]
            _keep(found, name, data)
            file.seek(4, 1)
        else:
            file.seek(size + 4, 1)
        if kind == b"IEND":
            return
        if file.tell() > end:
            raise _CutError


def _webp(file: BinaryIO, end: int, found: Texts) -> None:
    file.seek(12)
    while file.tell() + 8 <= end:
        kind, size = struct.unpack("<4sI", _take(file, 8))
        if kind == b"EXIF" and size <= LARGEST:
            _exif(_take(file, size).removeprefix(b"Exif\0\0"), found)
            return
        file.seek(size + size % 2, 1)
    if file.tell() > end:
        raise _CutError


def _exif(data: bytes, found: Texts) -> None:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        for number in range(count):
            _, kind, size, at = struct.unpack_from(order + "HHII", data, start + 2 + 12 * number)
            key, colon, _ = data[at : at + min(size, _LONGEST_NAME)].partition(b":")
            name = key.decode("latin-1").strip("\0 ").lower()
            if kind == 2 and colon and _wanted(found, name):
                _keep(found, name, data[at + len(key) + 1 : at + size])
    except struct.error:
        raise _CutError from None


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start of the content, end) of the boxes of an MP4 between two places."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", _take(file, 8))
        head = 8
        if size == 1:
            (size,) = struct.unpack(">Q", _take(file, 8))
            head = 16
        stop = end if size == 0 else start + size
        if stop < start + head or stop > end:
            raise _CutError
        yield kind, start + head, stop
        start = stop


def _mp4(file: BinaryIO, end: int, found: Texts, start: int = 0, inside: tuple[bytes, ...] = ()) -> None:
    for kind, begin, stop in _boxes(file, start, end):
        path = (*inside, kind)
        if path in ((b"moov",), (b"moov", b"udta")):
            _mp4(file, stop, found, begin, path)
        elif kind == b"meta" and b"moov" in inside:
            file.seek(begin)
            _meta(file, begin if _take(file, 8)[4:] == b"hdlr" else begin + 4, stop, found)


def _meta(file: BinaryIO, start: int, end: int, found: Texts) -> None:
    names: list[str] = []
    for kind, begin, stop in _boxes(file, start, end):
        if stop - begin > (_MOST_KEYS if kind == b"keys" else 2 * LARGEST):
            continue
        if kind == b"keys":
            file.seek(begin + 8)
            at, data = 0, _take(file, max(0, stop - begin - 8))
            while at + 8 <= len(data):
                (size,) = struct.unpack_from(">I", data, at)
                names.append(_text(data[at + 8 : at + size]))
                at += max(size, 8)
        elif kind == b"ilst":
            for key, inner, last in _boxes(file, begin, stop):
                number = int.from_bytes(key, "big")
                name = names[number - 1] if 0 < number <= len(names) else "comment" if key == b"\xa9cmt" else ""
                for what, first, finish in _boxes(file, inner, last):
                    if name and what == b"data" and finish - first >= 8:
                        file.seek(first + 8)
                        _keep(found, name, _take(file, finish - first - 8))


_SEGMENT, _CLUSTER, _TAGS, _TAG, _SIMPLE_TAG = 0x18538067, 0x1F43B675, 0x1254C367, 0x7373, 0x67C8
_TAG_NAME, _TAG_STRING = 0x45A3, 0x4487


def _vint(file: BinaryIO, keep_length_mark: bool) -> tuple[int, bool]:
    """A number of EBML, and whether it stands for "unknown"."""
    first = _take(file, 1)[0]
    length = 9 - first.bit_length()
    if length > 8:
        raise _CutError
    rest = _take(file, length - 1)
    unknown = first & ((1 << (8 - length)) - 1) == (1 << (8 - length)) - 1 and rest == b"\xff" * (length - 1)
    head = first if keep_length_mark else first & ((1 << (8 - length)) - 1)
    return int.from_bytes(bytes([head]) + rest, "big"), unknown


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    while start < end:
        file.seek(start)
        kind, _ = _vint(file, True)
        size, unknown = _vint(file, False)
        begin = file.tell()
        if unknown and kind == _CLUSTER:  # a stream: the tags came before
            return
        stop = end if unknown else begin + size
        if stop > end:
            raise _CutError
        yield kind, begin, stop
        start = stop


def _webm(file: BinaryIO, end: int, found: Texts, start: int = 0) -> None:
    for kind, begin, stop in _elements(file, start, end):
        if kind == _SIMPLE_TAG and stop - begin <= LARGEST:
            parts = {}
            for what, first, last in _elements(file, begin, stop):
                file.seek(first)
                parts[what] = _take(file, last - first)
            _keep(found, _text(parts.get(_TAG_NAME, b"")), parts.get(_TAG_STRING, b""))
        elif kind in (_SEGMENT, _TAGS, _TAG):
            _webm(file, stop, found, begin)


def _reader(head: bytes) -> tuple[str, Callable[[BinaryIO, int, Texts], None]] | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", _png
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP", _webp
    if head[4:8] == b"ftyp":
        return "MP4", _mp4
    return ("WebM", _webm) if head.startswith(b"\x1a\x45\xdf\xa3") else None


def texts_in(path: Path) -> tuple[str, Texts] | None:
    """(kind of file, the JSON texts in it) of a picture or a video; None for any other file.

    Raises WorkflowError where it holds none, OSError.
    """
    found: Texts = {}
    with path.open("rb") as file:
        reader = _reader(file.read(12))
        if reader is None:
            return None
        kind, read = reader
        cut = ""
        try:
            read(file, path.stat().st_size, found)
        except (_CutError, struct.error, RecursionError):
            cut = ", and it is damaged or cut off"
        except WorkflowError as error:
            raise WorkflowError(f"{path} ({kind}): {error}") from None
    if comment := found.pop("comment", ""):
        _from_comment(comment, found)
    if not found:
        raise WorkflowError(
            f"{path} ({kind}) holds no workflow{cut}. Wanted: a file as ComfyUI writes it; many sites and programs "
            "take the workflow out, and ComfyUI does with --disable-metadata"
        )
    return kind, found


def _from_comment(comment: str, found: Texts) -> None:
    """What VideoHelperSuite writes: one object with both."""
    try:
        both = json.loads(comment)
    except (ValueError, RecursionError):
        return
    for name in ("workflow", "prompt"):
        value = both.get(name) if isinstance(both, dict) else None
        if value and name not in found:
            found[name] = value if isinstance(value, str) else json.dumps(value)
