"""What importing a package in a child process ended in. Standard library only."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

HARMFUL = ("raises", "crashed", "hung")
# Source: the texts of torch, the CUDA and HIP libraries, Triton, Linux and Windows; the last two translate theirs, so
# the numbers count too. In a traceback the lines of source code are indented, and what an exception says is not.
_SHORT = re.compile(
    r"^(?!\s)[^\n]*(?:out[ _]of[ _]memory|OutOfMemory|MemoryError|MemoryAllocation|STATUS_ALLOC_FAILED|std::bad_alloc"
    r"|not enough memory|can(?:no|')t allocate memory(?! in static TLS)|paging file is too small"
    r"|No space left on device|not enough space on the disk|disk quota exceeded"
    r"|\[Errno (?:12|28)\]|\[WinError (?:8|14|112|1455)\])",
    re.IGNORECASE | re.MULTILINE,
)


def short(said: str) -> bool:
    """Did an exception come from a lack of memory or disk space just then? `said`: its words or its traceback."""
    return _SHORT.search(said) is not None


@dataclass(frozen=True)
class Verdict:
    """What an import in a child ended in.

    outcome: "works"; "cannot import" (an ImportError, which callers are written for); "raises" (another exception),
    "crashed", "hung"; "undecided": the time was up, memory was short, or something from outside ended it; "unknown":
    the child did not get as far as the package.
    detail: one sentence; raw: the child's own words; seconds: of the import; notes: what it changed for the whole
    process; hidden: packages that were kept away from the child.
    """

    outcome: str
    detail: str = ""
    raw: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    @property
    def harmful(self) -> bool:
        return self.outcome in HARMFUL

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Verdict:
        """Raises TypeError or AttributeError for anything else."""
        notes, hidden = (tuple(map(str, data.get(key, ()))) for key in ("notes", "hidden"))
        return cls(**{**data, "notes": notes, "hidden": hidden})
