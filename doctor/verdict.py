"""What importing a package in a child process ended in. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

HARMFUL = ("raises", "crashed", "hung")


@dataclass(frozen=True)
class Verdict:
    """What an import in a child ended in.

    outcome: "works"; "cannot import" (an ImportError, which callers are written for); "raises" (another exception),
    "crashed", "hung"; "undecided": the time was up, or something from outside ended it; "unknown": the child did not
    get as far as the package.
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
