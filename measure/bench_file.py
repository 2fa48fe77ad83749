"""Result files of `attune bench`: JSON and CSV, written and read back. docs/benchmarks.md describes the fields."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .shapes import Shape

KIND = "attune bench"
SCHEMA = 1
UNITS = {"time": "ms", "speed": "TFLOP/s", "memory": "bytes", "clock": "MHz", "power": "W"}
STATUSES = ("measured", "refused", "not proved", "failed")
_TEXTS = ("kernel", "shape", "dtype", "status", "reason", "verdict")
_KEY_NUMBERS = ("batch", "heads", "q_len", "kv_len", "head_dim")
_FIGURES = (
    "median_ms", "low_ms", "high_ms", "repeats", "tflops", "peak_share", "extra_bytes", "cosine", "l1", "l2",
    "largest", "compared_rows", "clock_mhz", "power_w",
)  # fmt: skip
FIELDS = ("kernel", "shape", *_KEY_NUMBERS, "dtype", "status", "reason", "verdict", *_FIGURES)
_MACHINE = ("device", "architecture", "threads", "driver", "torch", "cuda", "triton", "python", "system")
_COLUMNS = ("kind", "schema", *FIELDS, *(f"machine_{name}" for name in _MACHINE), "machine_packages", "rows")


class NotAResultError(ValueError):
    """A file that holds no result that this version can read."""


def empty_row(shape: Shape, dtype: str) -> dict[str, Any]:
    """A row of which only the case is known."""
    row: dict[str, Any] = {**dict.fromkeys(_TEXTS, ""), **dict.fromkeys(_FIGURES)}
    numbers = dict(zip(_KEY_NUMBERS, shape.numbers, strict=True))
    row.update({"shape": shape.name, "dtype": dtype, **numbers})
    return {name: row[name] for name in FIELDS}


def as_json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def as_csv(result: Mapping[str, Any]) -> str:
    """One line per row; the machine is repeated in each. The last column is the number of rows: it shows a cut."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    machine = result["machine"]
    about = {"kind": KIND, "schema": SCHEMA, **{f"machine_{name}": machine[name] for name in _MACHINE}}
    about["machine_packages"] = " ".join(f"{name}={version}" for name, version in machine["packages"].items())
    about["rows"] = len(result["rows"])
    for row in result["rows"]:
        writer.writerow({**about, **row})
    return text.getvalue()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # not mkstemp: others may read a result
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_result(path: Path) -> dict[str, Any]:
    """{"machine": …, "rows": […]} of a JSON or CSV file. Raises NotAResultError, or OSError."""
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets put a mark before CSV
    except UnicodeDecodeError:
        raise NotAResultError(f"{path} is no result of attune bench: it is not text") from None
    if not text.strip():
        raise NotAResultError(f"{path} is empty")
    result = _from_json(path, text) if text.lstrip().startswith(("{", "[")) else _from_csv(path, text)
    if not result["rows"]:
        raise NotAResultError(f"{path} holds no rows: nothing was measured")
    seen = set()
    for number, row in enumerate(result["rows"], 1):
        _check(f"{path}: row {number}", row)
        if key(row) in seen:
            raise NotAResultError(f"{path}: {row['kernel']} is there twice for {row['shape']}, {row['dtype']}")
        seen.add(key(row))
    return result


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows have in common that can be compared."""
    return (row["kernel"], row["shape"], *(row[name] for name in _KEY_NUMBERS), row["dtype"])


def _wrong_kind(path: Path, kind: object, schema: object) -> NotAResultError | None:
    if kind != KIND:
        return NotAResultError(f"{path} is no result of attune bench: wanted kind {KIND!r}, found {kind!r}")
    if str(schema) != str(SCHEMA):
        return NotAResultError(
            f"{path} was written by another version of ComfyUI-Attune: wanted schema {SCHEMA}, found {schema!r}"
        )
    return None


def _from_json(path: Path, text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotAResultError(f"{path} is damaged or cut off: {error}") from None
    if not isinstance(data, dict):
        raise NotAResultError(f"{path} is no result of attune bench: it holds a {type(data).__name__}")
    if wrong := _wrong_kind(path, data.get("kind"), data.get("schema")):
        raise wrong
    if data.get("units") != UNITS:
        raise NotAResultError(f"{path} has other units: wanted {UNITS}, found {data.get('units')}")
    if not isinstance(data.get("rows"), list) or not isinstance(data.get("machine"), dict):
        raise NotAResultError(f"{path} is damaged: it has no rows, or no machine")
    return data


def _from_csv(path: Path, text: str) -> dict[str, Any]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    rows: list[dict[str, Any]] = []
    machines: list[dict[str, Any]] = []
    counts: set[str] = set()
    try:
        columns = list(reader.fieldnames or ())
        missing = [name for name in ("kind", "schema", *FIELDS, "rows") if name not in columns]
        if missing:
            also = [name for name in columns if name not in _COLUMNS]
            raise NotAResultError(
                f"{path} is no result of attune bench in the units of this version: it has no column "
                f"{', '.join(missing[:6])}{', …' if len(missing) > 6 else ''}"
                + (f"; it has {', '.join(map(repr, also[:6]))}" if also else "")
            )
        for line in reader:
            if None in line or None in line.values():
                raise NotAResultError(f"{path} is damaged or cut off at line {reader.line_num}: its columns do not fit")
            if wrong := _wrong_kind(path, line["kind"], line["schema"]):
                raise wrong
            counts.add(line["rows"])
            rows.append(_csv_row(path, reader.line_num, line))
            machine = {name: line.get(f"machine_{name}") or "" for name in _MACHINE}
            listed = (line.get("machine_packages", "rows") or "").split()
            machine["packages"] = dict(one.partition("=")[::2] for one in listed)
            machines.append(machine)
    except csv.Error as error:
        raise NotAResultError(f"{path} is damaged or cut off at line {reader.line_num}: {error}") from None
    if any(machine != machines[0] for machine in machines):
        raise NotAResultError(f"{path} holds rows of several machines: compare one with one")
    if wrong_counts := counts - {str(len(rows))}:
        count = min(wrong_counts)
        raise NotAResultError(
            f"{path} is cut off or was put together: it holds {len(rows)} of {count or repr(count)} rows"
        )
    return {"machine": machines[0] if machines else {}, "rows": rows}


def _csv_row(path: Path, number: int, line: Mapping[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {name: line[name] for name in _TEXTS}
    try:
        row.update({name: int(line[name]) for name in _KEY_NUMBERS})
        row.update({name: float(line[name]) if line[name] else None for name in _FIGURES})
    except ValueError as error:
        raise NotAResultError(f"{path} is damaged at line {number}: {error}") from None
    return row


def _check(where: str, row: Any) -> None:
    """Raises NotAResultError where a row lacks what a comparison needs."""

    def number(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise NotAResultError(f"{where} is damaged: {name} is {value!r}, wanted a number")

    if not isinstance(row, dict):
        raise NotAResultError(f"{where} is damaged: it is a {type(row).__name__}")
    if missing := [name for name in FIELDS if name not in row]:
        raise NotAResultError(f"{where} has no {', '.join(missing)}: it is damaged, or in other units")
    if texts := [name for name in _TEXTS if not isinstance(row[name], str)]:
        raise NotAResultError(f"{where} is damaged: {texts[0]} is {row[texts[0]]!r}, wanted text")
    for name in _KEY_NUMBERS:
        number(name, row[name])
    if row["status"] not in STATUSES:
        raise NotAResultError(f"{where} is damaged: status {row['status']!r}, wanted one of {', '.join(STATUSES)}")
    if row["status"] == "measured":
        for name in ("median_ms", "low_ms", "high_ms", "repeats", "tflops"):
            number(name, row[name])
        if not row["median_ms"] > 0:
            raise NotAResultError(f"{where} is damaged: its time is {row['median_ms']!r}")


def measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["status"] == "measured"]
