"""The last runs on disk: one JSON file each, whole or not there, with names that sort by time."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import time
from pathlib import Path

from ..attention.machine import Machine
from ..doctor.store import home
from ..measure.run_text import KIND, SCHEMA
from .runs import RunInfo

log = logging.getLogger("attune")
FOLDER = "runs"
_KEPT = 50
_NAME = re.compile(r"\d{8}-\d{6}-\d{6}-\d+\.json")
_said: set[Path] = set()  # folders that the log has complained of


def _write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=name, suffix=".part", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, folder / name)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return folder / name


def _forget_old(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name))
    for name in names[:-_KEPT]:
        with contextlib.suppress(OSError):  # somebody reads it, or another ComfyUI has removed it
            (folder / name).unlink()


def save(run: RunInfo, machine: Machine, folder: Path | None = None) -> None:
    """Keep a run that has ended; the oldest above 50 go. What cannot be written costs one warning and nothing else."""
    folder = folder or home() / FOLDER
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(run.started))
    name = f"{stamp}-{int(run.started % 1 * 1e6):06d}-{run.number}.json"
    try:
        text = json.dumps({"kind": KIND, "schema": SCHEMA, **run.as_data(machine)}, separators=(",", ":"))
        run.file = _write(folder, name, text)
        _forget_old(folder)
    except (OSError, ValueError) as error:
        if folder not in _said:
            _said.add(folder)
            said = "Attune: the record of a run cannot be written to %s (%s); set ATTUNE_HOME to a folder that can."
            log.warning(said, folder, error)
