"""One look at the machine: from verdicts to the report that the command and the node show."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..attention.kernel import Kernel
from ..attention.machine import Device, Machine
from .commands import quarantine_rows
from .cures import Cure, read_place
from .diagnose import Diagnosis, diagnose, outlook, remarks
from .kernel_verdict import KernelVerdict
from .quarantine import off
from .quarantine import store as quarantine
from .report import Report

PENDING = KernelVerdict("undecided", "has not been tried yet")
_CLEAR = "`attune cache clear --verdicts` gives it a new chance."
_PROBE_AGAIN = (
    "'Probe again' in the sidebar tab Attention, if it works then, or `attune cache clear --verdicts` gives it a new "
    "chance."
)


def _quarantined(folder: Path) -> dict[str, str]:
    """Package that ComfyUI does not get to see → why."""
    rows = [] if off() else quarantine_rows(quarantine(folder).read())
    return {row["package"]: row["status"] for row in rows if row["quarantined"]}


def _kept_out(one: Diagnosis, kept: Mapping[str, str]) -> Diagnosis:
    """In ComfyUI, a package in quarantine looks as if it were not installed; installing it would change nothing."""
    why = kept.get(one.kernel.package.partition(".")[0])
    if why is None or one.helpless or one.verdict.outcome != "not installed":
        return one
    package = one.kernel.package.partition(".")[0]
    cure = Cure("To let ComfyUI see it again, as it is:", f"attune quarantine remove {package}")
    return dataclasses.replace(one, cause=f"ComfyUI does not get to see {package}: {why}.", cure=cure)


def report(
    kernels: Iterable[Kernel],
    verdicts: Mapping[str, KernelVerdict],
    machine: Machine,
    pack: Path,
    folder: Path,
    device: Device | None = None,
    *,
    elsewhere: Sequence[dict[str, Any]] = (),
    said: Sequence[str] | None = None,
    failed: Mapping[str, tuple[str, int]] = MappingProxyType({}),
) -> Report:
    """What `verdicts` mean for `device` (the machine's main one). A kernel without a verdict has not been tried yet.

    pack: the pack's folder. folder: that of the pack's state. elsewhere: rows of listing.kernel_rows that are not about
    `kernels`. said: what is said about the machine as a whole, where it is not what remarks() says. failed: kernels
    that failed in models → (why, in how many), as host/remembered.py has it.
    """
    device = device or machine.main_device
    kernels = list(kernels)
    known = {kernel.name: verdicts.get(kernel.name, PENDING) for kernel in kernels}
    kept = _quarantined(folder)
    found = [_kept_out(one, kept) for one in diagnose(kernels, known, machine, read_place(pack), device)]
    told = list(remarks(machine, device) if said is None else said)
    told += [
        f"ComfyUI does not get to see {package}: {why}. `attune quarantine remove {package}` lifts it."
        for package, why in kept.items()
    ]
    tried = {kernel.name for kernel in kernels}
    for name, (why, count) in failed.items():
        models = f"{count} model{'' if count == 1 else 's'}"
        again = _PROBE_AGAIN if name in tried else _CLEAR
        told.append(f"{name}: {why} in {models} sampled here, and is not used there any more. {again}")
    return Report(machine, device, found, outlook(found, machine, device), told, elsewhere)
