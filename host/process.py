"""What this ComfyUI process has: its machine, its kernels and their verdicts, and what a router needs of its host."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import torch
from comfy.cli_args import args as launch

from ..attention.kernel import Kernel
from ..attention.link import HostLink
from ..attention.machine import Machine, read_machine
from ..doctor.hub import announce
from ..doctor.store import home
from ..kernels import KERNELS
from . import timings, trampoline
from .again import RepeatableVerdicts
from .kernels import host_kernels
from .memory import spare_bytes
from .server import prompt_runs

PACK = Path(__file__).absolute().parents[1]

# Launch flags of the host that choose its attention function, as in comfy/cli_args.py (newer ones may be missing).
_FLAGS = (
    "use_split_cross_attention",
    "use_quad_cross_attention",
    "use_pytorch_cross_attention",
    "use_sage_attention",
    "use_flash_attention",
    "use_ck_attention",
)


def host_flag() -> str:
    """The launch flag that chose the host's attention, as the user typed it, or ""."""
    return next(("--" + flag.replace("_", "-") for flag in _FLAGS if getattr(launch, flag, False)), "")


@functools.cache
def machine() -> Machine:
    announce(home())
    chosen = trampoline.plain(host_attention.optimized_attention)
    name = getattr(chosen, "__name__", "").removeprefix("attention_")
    # Started with --cpu, ComfyUI leaves the GPUs alone, and so does the pack.
    return read_machine(name, host_flag(), gpus=not getattr(launch, "cpu", False))


@functools.cache
def kernels() -> dict[str, Kernel]:
    """Every kernel that this process knows, by name: the pack's and the two of the host."""
    return {kernel.name: kernel for kernel in (*KERNELS, *host_kernels(host_attention))}


@functools.cache
def verdicts() -> RepeatableVerdicts:
    return RepeatableVerdicts(KERNELS, machine, PACK, home(), prompt_runs)


MEASURED = timings.Kept(home, lambda: (machine(), kernels().values()))


def _free_bytes(device: str) -> int | None:
    try:
        here = torch.device(device)
        free = int(comfy.model_management.get_free_memory(here))
        memory = sys.modules.get("comfy.memory_management")
        if getattr(memory, "aimdo_enabled", False) and here.type == "cuda":
            # Weights that the host would give up under pressure, counted as its own ModelPatcher counts them.
            free += int(sys.modules["comfy_aimdo.model_vbar"].vbars_analyze(here.index))
        return free
    except Exception:  # a device the host knows nothing of
        return None


LINK = HostLink(
    plain=trampoline.plain,
    interrupts=(comfy.model_management.InterruptProcessingException,),
    free_memory=lambda: comfy.model_management.soft_empty_cache(True),
    free_bytes=_free_bytes,
    refused=lambda device: verdicts().refused(device),
    timings=MEASURED.timings,
    spare_bytes=spare_bytes,
)
