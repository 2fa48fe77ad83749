"""What the pack and Triton keep on disk: how much, where, and deleting it without touching anything else."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .quarantine import State
from .quarantine import store as quarantine_store

# An entry of Triton's cache is a folder named by a hash: base32 of a SHA-256 today, hexadecimal before 3.0. Whatever
# else lies in that folder (TRITON_CACHE_DIR may point anywhere) is not Triton's and is left alone.
_ENTRY = re.compile(r"[A-Z2-7]{40,64}|[0-9a-f]{32,64}")


class LeftAloneError(Exception):
    """A folder that must not be emptied; the text says why and what to do."""


@dataclass(frozen=True)
class Cache:
    """One kind of cache: `name` as on the command line, the folder or file that holds it, what it costs to lose it."""

    name: str
    place: Path | None
    about: str

    def entries(self) -> list[Path]:
        """What would be deleted: files, and folders that are no links."""
        if self.place is None or not self.place.exists():
            return []
        if self.place.is_file():
            return [self.place]
        return sorted(p for p in self.place.iterdir() if _ENTRY.fullmatch(p.name) and p.is_dir() and not p.is_symlink())

    def size(self) -> int:
        """Bytes in those entries, links not followed."""
        return sum(_sizes(self.entries()))

    def clear(self) -> int:
        """Delete the entries; returns how many bytes are gone. Raises LeftAloneError and OSError."""
        if self.place is not None and self.place.is_symlink():
            raise LeftAloneError(
                f"{self.place} is a link to {self.place.resolve()}: nothing is deleted through it. If that folder is "
                f"the {self.name} cache, delete what is in it yourself."
            )
        freed = 0
        for entry in self.entries():
            size = sum(_sizes([entry]))
            if entry.is_dir():
                shutil.rmtree(entry)  # links inside go, what they lead to stays
            else:
                entry.unlink()
            freed += size
        return freed


class QuarantineVerdicts(Cache):
    """The verdicts of the import probe, in the file that also holds what the user asked for, which stays."""

    def clear(self) -> int:
        before = self.size()
        if before and self.place is not None:

            def forget(state: State) -> None:
                state.verdicts.clear()

            if not quarantine_store(self.place.parent).update(forget):
                raise OSError(f"{self.place} could not be written")
        return before - self.size()


def _sizes(paths: list[Path]) -> Iterator[int]:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            for folder, _, names in os.walk(path):
                for name in names:
                    try:
                        yield os.lstat(os.path.join(folder, name)).st_size
                    except FileNotFoundError:  # another process tidies up
                        continue
        else:
            yield path.lstat().st_size


def triton_folder() -> Path | None:
    """The folder that the installed Triton reports as its cache; None where there is no Triton that says so."""
    try:
        import triton
    except Exception:  # a broken Triton has no cache to clear
        return None
    reported = getattr(getattr(getattr(triton, "knobs", None), "cache", None), "dir", None)
    if reported is None:
        try:
            from triton.runtime.cache import default_cache_dir  # before 3.4
        except ImportError:
            return None
        reported = os.environ.get("TRITON_CACHE_DIR") or default_cache_dir()
    return Path(reported)


def caches(home: Path) -> dict[str, list[Cache]]:
    """The caches by their names on the command line. `home` is the pack's folder for its state."""
    return {
        "triton": [Cache("triton", triton_folder(), "compiled kernels; they are compiled again when needed")],
        "verdicts": [
            QuarantineVerdicts("verdicts", home / "quarantine.json", "what importing the packages did; looked at anew"),
            Cache("verdicts", home / "verdicts.json", "what the kernels did when tried; tried anew"),
            Cache("verdicts", home / "failures.json", "where kernels failed in models; they get a new chance there"),
        ],
        "timings": [Cache("timings", home / "timings.json", "measured speeds; measured anew")],
    }
