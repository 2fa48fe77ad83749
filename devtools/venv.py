"""The virtual environment in .venv: made when missing, filled part by part, each part stamped once it is complete."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from . import pip
from .say import Stop, note, step

OLDEST, NEWEST = (3, 10), (3, 13)
DISK_GB = 8


class Part(NamedTuple):
    """Something to install: requirement lines, and how it is called in messages."""

    name: str
    requirements: tuple[str, ...]
    title: str

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.requirements).encode()).hexdigest()


class Venv:
    """A virtual environment in `folder`. `python` is its interpreter."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache
        self.python = pip.python_of(folder)
        self.stamp = folder / "attune-parts.json"

    def installed(self) -> dict[str, str]:
        """Digest by name of each part that was completely installed."""
        try:
            return dict(json.loads(self.stamp.read_text("utf-8")))
        except (OSError, ValueError):
            return {}

    def missing(self, parts: list[Part]) -> list[Part]:
        done = self.installed() if self.python.exists() else {}
        return [part for part in parts if done.get(part.name) != part.digest()]

    def prepare(self, parts: list[Part]) -> None:
        """Make the environment and install the parts that are not there. Raises Stop with one sentence."""
        missing = self.missing(parts)
        if not missing:
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        require_disk(self.folder, DISK_GB if any(part.name in ("torch", "comfyui") for part in missing) else 1)
        if not self._works():
            self._create()
        if "pip" not in self.installed():
            self._install(Part("pip", (pip.PIN,), "pip"))
        for part in missing:
            self._install(part)

    def _works(self) -> bool:
        if not self.python.exists():
            return False
        probe = [str(self.python), "-c", "import pip, sys; print(*sys.version_info[:2])"]
        try:
            found = subprocess.run(probe, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return found.returncode == 0 and OLDEST <= tuple(map(int, found.stdout.split())) <= NEWEST

    def _create(self) -> None:
        require_python()
        if self.folder.exists():
            note(f"{self.folder} is unfinished or of another Python; it is made anew")
            shutil.rmtree(self.folder)
        step(f"Making a virtual environment in {self.folder}")
        made = subprocess.run([sys.executable, "-m", "venv", str(self.folder)], capture_output=True, text=True)
        if made.returncode or not self.python.exists():
            last = (made.stdout + made.stderr).strip().splitlines() or ["no output"]
            raise Stop(f"The virtual environment {self.folder} could not be made: {last[-1]}")

    def _install(self, part: Part) -> None:
        step(f"Installing {part.title}")
        pip.heal(self.folder)
        pip.install(self.folder, part.requirements, self.cache, part.name)
        stamp = {**self.installed(), part.name: part.digest()}
        fresh = self.stamp.with_suffix(".new")
        fresh.write_text(json.dumps(stamp, indent=1), "utf-8")
        os.replace(fresh, self.stamp)


def require_python() -> None:
    """Raise Stop when this Python cannot make the environment."""
    here = sys.version_info[:2]
    if not OLDEST <= here <= NEWEST:
        raise Stop(f"Python 3.10 to 3.13 is needed, this is {here[0]}.{here[1]}: run dev.py with one of those.")
    for name in ("venv", "ensurepip"):
        if importlib.util.find_spec(name) is None:
            raise Stop(
                f"This Python ({sys.executable}) lacks the module {name}: install it (Debian, Ubuntu: "
                f"`apt-get install python{here[0]}.{here[1]}-venv`) and run this again."
            )


def require_disk(folder: Path, gigabytes: float) -> None:
    """Raise Stop when the disk that holds `folder` has too little room; what lies in `folder` already counts."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    wanted = gigabytes - (_size(folder) / 1e9 if free < gigabytes else 0)
    if free < max(wanted, 1):
        raise Stop(
            f"Too little disk space for {folder}: about {max(wanted, 1):.1f} GB are needed, {free:.1f} GB are free; "
            "make room and run this again."
        )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
