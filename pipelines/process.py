"""What a process without ComfyUI has: its machine, the pack's kernels and their verdicts, and what a router needs."""

from __future__ import annotations

import functools
import gc
import os
from pathlib import Path

import torch

from ..attention.kernel import Kernel
from ..attention.link import HostLink
from ..attention.machine import Machine, read_machine
from ..attention.timings import Timings
from ..doctor.hub import announce
from ..doctor.store import home
from ..host.memory import spare_bytes
from ..host.timings import fingerprint, load, save, tuning_wanted
from ..host.verdicts import OPEN, Verdicts
from ..kernels import KERNELS

PACK = Path(__file__).absolute().parents[1]
UNTRIED = "has no verdict on this machine yet; `attune doctor` tries it"


def switched_off() -> bool:
    """`ATTUNE=off` in the environment makes the whole pack inert."""
    return os.environ.get("ATTUNE", "").strip().lower() in ("off", "0", "false", "no")


@functools.cache
def machine() -> Machine:
    announce(home(PACK))
    return read_machine()


@functools.cache
def kernels() -> dict[str, Kernel]:
    """Every kernel that exists outside ComfyUI, by name."""
    return {kernel.name: kernel for kernel in KERNELS}


@functools.cache
def verdicts() -> Verdicts:
    # Always "busy": a script's process tries what it was asked for by name, and nothing else in the background.
    return Verdicts(KERNELS, machine, PACK, home(PACK), lambda: True)


def refused(device: str) -> dict[str, str]:
    """Kernel name → why it may not be called on this device now."""
    return {name: UNTRIED if why == OPEN else why for name, why in verdicts().refused(device).items()}


TIMINGS = Timings() if tuning_wanted() else None


@functools.cache
def _timings_of() -> str:
    """The fingerprint that measurements are kept under; what is kept under it is read now."""
    assert TIMINGS is not None
    found = fingerprint(machine(), kernels().values())
    load(TIMINGS, home(PACK), found)
    return found


def recall_timings() -> Timings | None:
    """What `auto` has measured here, also in earlier processes; None where it is not to measure anything."""
    if TIMINGS is not None:
        _timings_of()
    return TIMINGS


def keep_timings() -> None:
    """Write down what was measured since the last time."""
    if TIMINGS is not None and TIMINGS.changed:
        save(TIMINGS, home(PACK), _timings_of())


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free_bytes(device: str) -> int | None:
    """What the driver says is free, and what torch's allocator holds without using it."""
    here = torch.device(device)
    if here.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(here)
    return int(free + torch.cuda.memory_reserved(here) - torch.cuda.memory_allocated(here))


LINK = HostLink(
    interrupts=(KeyboardInterrupt,),
    free_memory=_free_memory,
    free_bytes=_free_bytes,
    refused=refused,
    timings=TIMINGS,
    spare_bytes=spare_bytes,
)
