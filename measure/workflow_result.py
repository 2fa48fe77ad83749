"""Result files of `attune bench --workflow`: JSON and CSV, written and read back."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench_file import NotAResultError

KIND = "attune bench workflow"
SCHEMA = 1
UNITS = {"time": "s", "psnr": "dB"}
STATUSES = ("measured", "other kernel", "cached", "failed")
TOTAL = "total"
_TEXTS = ("workflow", "kernel", "observed", "stage", "node", "title", "status", "reason")
_WHOLE = ("frames", "width", "height", "repeats", "steps", "largest_difference")
_REAL = ("seconds", "low_seconds", "high_seconds", "seconds_per_step", "psnr_db", "ssim")
FIELDS = (
    "workflow", "kernel", "observed", "frames", "width", "height", "stage", "node", "title", "status", "reason",
    "seconds", "low_seconds", "high_seconds", "repeats", "steps", "seconds_per_step", "psnr_db", "ssim",
    "largest_difference",
)  # fmt: skip
_MACHINE = ("device", "memory_bytes", "comfyui", "torch", "python", "system", "flags")
_COLUMNS = ("kind", "schema", *FIELDS, *(f"machine_{name}" for name in _MACHINE), "rows")


def empty_row(**known: Any) -> dict[str, Any]:
    row = {name: "" if name in _TEXTS else None for name in FIELDS}
    row.update(known)
    return row


def as_csv(result: Mapping[str, Any]) -> str:
    """One line per row; the machine is repeated in each. The last column is the number of rows: it shows a cut."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    about = {"kind": KIND, "schema": SCHEMA, "rows": len(result["rows"])}
    about.update({f"machine_{name}": result["machine"][name] for name in _MACHINE})
    for row in result["rows"]:
        writer.writerow({**about, **row})
    return text.getvalue()


def machine_data(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The server's machine, of its /system_stats: no names of users or hosts, no paths."""
    system = stats.get("system") or {}
    device: Mapping[str, Any] = next(iter(stats.get("devices") or []), {})
    flags = [part for part in system.get("argv") or [] if part.startswith("--")]
    return {
        "device": str(device.get("name", "")),
        "memory_bytes": device.get("vram_total"),
        "comfyui": str(system.get("comfyui_version", "")),
        "torch": str(system.get("pytorch_version", "")),
        "python": str(system.get("python_version", "")).split(" ")[0],
        "system": str(system.get("os", "")),
        "flags": " ".join(sorted(part.partition("=")[0] for part in flags)),
    }


def is_workflow_result(path: Path) -> bool:
    """Does the file say that it is one of these? Raises OSError."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = file.read(4096)
    return KIND in start or ("seconds_per_step" in start and start.startswith("kind,"))  # also where a file is cut off


def read_workflow_result(path: Path) -> dict[str, Any]:
    """{"machine": …, "rows": […]} of a JSON or CSV file, its rows as `comparable` gives them.

    Raises NotAResultError, or OSError.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise NotAResultError(f"{path} is no result of attune bench: it is not text") from None
    try:
        result = json.loads(text) if text.lstrip().startswith("{") else _from_csv(text)
        if result["kind"] != KIND or str(result["schema"]) != str(SCHEMA):
            raise NotAResultError(
                f"{path}: wanted kind {KIND!r} and schema {SCHEMA}, found {result['kind']!r} and {result['schema']!r}"
            )
        if not result["rows"]:
            raise NotAResultError(f"{path} holds no rows: nothing was measured")
        for row in result["rows"]:
            _check(row)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, csv.Error) as error:
        if isinstance(error, NotAResultError):
            raise
        raise NotAResultError(f"{path} is damaged or cut off ({type(error).__name__}: {error})") from None
    return {"machine": result["machine"], "rows": comparable(result["rows"])}


def comparable(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows that two results are compared by, as `compare` takes them: the whole runs, and their sampling."""
    rows = []
    for row in given:
        if row["stage"] != TOTAL and not row["steps"]:
            continue
        seconds = {
            f"{name}_ms": row[f"{key}seconds"] for name, key in (("median", ""), ("low", "low_"), ("high", "high_"))
        }
        size = f"{row['frames'] or '?'} frames {row['width'] or '?'}x{row['height'] or '?'}"
        stage = TOTAL if row["stage"] == TOTAL else f"{row['stage']} {row['node']}"
        known = {name: row[name] for name in ("kernel", "status", "reason", "repeats")}
        times = {name: None if value is None else value * 1000 for name, value in seconds.items()}
        key = (row["workflow"], row["kernel"], size, stage)
        rows.append({**known, **times, "shape": f"{row['workflow']}, {size}", "dtype": stage, "key": key})
    return rows


def _from_csv(text: str) -> dict[str, Any]:
    lines = list(csv.DictReader(io.StringIO(text), strict=True))
    rows = []
    for line in lines:
        if None in line or None in line.values() or line["rows"] != str(len(lines)):
            raise ValueError(f"it holds {len(lines)} of {line.get('rows')} rows")
        row: dict[str, Any] = {name: line[name] for name in _TEXTS}
        row.update({name: int(line[name]) if line[name] else None for name in _WHOLE})
        row.update({name: float(line[name]) if line[name] else None for name in _REAL})
        rows.append(row)
    first = lines[0] if lines else {"kind": KIND, "schema": SCHEMA}
    machine: dict[str, Any] = {name: first.get(f"machine_{name}", "") for name in _MACHINE}
    return {"kind": first["kind"], "schema": first["schema"], "machine": machine, "rows": rows}


def _check(row: Mapping[str, Any]) -> None:
    missing = [name for name in FIELDS if name not in row]
    if missing or row["status"] not in STATUSES:
        raise ValueError(f"a row has no {', '.join(missing)}" if missing else f"status {row['status']!r}")
    if row["status"] == "measured":
        for name in ("seconds", "low_seconds", "high_seconds", "repeats"):
            if not 0 < row[name] < float("inf"):
                raise ValueError(f"{name} is {row[name]!r}")
