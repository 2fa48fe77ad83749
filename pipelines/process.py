"""What a process without ComfyUI has: its machine, the pack's kernels and their verdicts, and what a router needs."""

from __future__ import annotations

import functools
import gc
import os
from dataclasses import replace
from pathlib import Path

import torch

from ..attention.kernel import Kernel
from ..attention.link import HostLink
from ..attention.machine import Machine, read_machine
from ..attention.plan import HOST
from ..attention.policy import FAMILIES
from ..doctor.hub import announce
from ..doctor.store import home
from ..host.memory import spare_bytes
from ..host.timings import Kept
from ..host.verdicts import OPEN, Verdicts
from ..kernels import KERNELS

PACK = Path(__file__).absolute().parents[1]
# The kernels here that a back end of diffusers calls: the first one that this machine takes.
_CALLED = {"sage": FAMILIES["sage"], "flash": ("flash2",), "xformers": ("xformers", "xformers_cutlass")}
UNTRIED = "has no verdict on this machine yet; `attune doctor` tries it"


def switched_off() -> bool:
    """`ATTUNE=off` in the environment makes the whole pack inert."""
    return os.environ.get("ATTUNE", "").strip().lower() in ("off", "0", "false", "no")


@functools.cache
def _machine() -> Machine:
    announce(home(PACK))
    return read_machine()


def machine(own: str = "") -> Machine:
    """This machine. `own`: what a pipeline computes attention with by itself, as `Machine.host_attention` names it."""
    return replace(_machine(), host_attention=own) if own else _machine()


@functools.cache
def kernels() -> dict[str, Kernel]:
    """Every kernel that exists outside ComfyUI, by name."""
    return {kernel.name: kernel for kernel in KERNELS}


@functools.cache
def verdicts() -> Verdicts:
    # Always "busy": a script's process tries what it was asked for by name, and nothing else in the background.
    return Verdicts(KERNELS, machine, PACK, home(PACK), lambda: True)


def refused(own: str, device: str) -> dict[str, str]:
    """Kernel name → why it may not be called on this device now. HOST is what the pipeline itself calls, `own`."""
    found = {name: UNTRIED if why == OPEN else why for name, why in verdicts().refused(device).items()}
    known = verdicts().known(device)
    name = next((name for name in _CALLED.get(own, ()) if name in known and not known[name].reasons), "")
    if name in found:
        found[HOST] = f"the pipeline's own attention is {name} here, and {found[name]}"
    return found


@functools.cache
def measured(own: str = "") -> Kept:
    """What `auto` has measured for pipelines that compute attention by `own`: it compares kernels with that."""
    return Kept(lambda: home(PACK), lambda: (machine(own), kernels().values()))


@functools.cache
def link(own: str = "") -> HostLink:
    """What a router needs to know, for pipelines that compute attention by `own`."""
    return HostLink(
        interrupts=(KeyboardInterrupt,),
        free_memory=_free_memory,
        free_bytes=_free_bytes,
        refused=functools.partial(refused, own),
        timings=measured(own).timings,
        spare_bytes=spare_bytes,
    )


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
