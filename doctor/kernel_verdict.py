"""What the probe of one kernel ended in, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# Only "works" lets a kernel be called. "undecided": the probe was disturbed or memory was short; it is not kept.
OUTCOMES = (
    "works",
    "not installed",
    "cannot import",
    "unsupported",
    "wrong numbers",
    "crashed",
    "hung",
    "undecided",
)


@dataclass(frozen=True)
class KernelVerdict:
    """What became of one kernel on one device.

    outcome: one of OUTCOMES. detail: one sentence without a full stop. raw: the words of the kernel or its process,
    as they came. error: the largest relative L2 error that was measured, and `allowed` what the kernel declares for
    that call. milliseconds: the fastest of a few calls of the shape `timed`. calls: how many calls were compared.
    choice: the configurations that were the fastest here, where a kernel has several (Kernel.tuning).
    """

    outcome: str
    detail: str = ""
    raw: str = ""
    reasons: tuple[str, ...] = ()
    error: float | None = None
    allowed: float | None = None
    milliseconds: float | None = None
    timed: str = ""
    calls: int = 0
    choice: dict[str, str] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        return self.outcome == "works"

    @property
    def lasting(self) -> bool:
        """May it be kept? What the machine's description alone decides is decided again each time, at no cost."""
        return self.outcome not in ("undecided", "not installed") and not self.reasons

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelVerdict:
        """Raises TypeError, ValueError or AttributeError for anything else."""
        verdict = cls(**{**data, "reasons": tuple(map(str, data.get("reasons", ())))})
        if verdict.outcome not in OUTCOMES:
            raise ValueError(f"unknown outcome {verdict.outcome!r}")
        if not isinstance(verdict.choice, dict):
            raise ValueError(f"choice is no table of names: {verdict.choice!r}")
        return verdict
