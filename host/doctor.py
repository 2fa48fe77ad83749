"""The doctor inside ComfyUI: what the node AttentionDoctor shows."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy.cli_args import args as launch

from ..attention.listing import kernel_rows
from ..attention.machine import with_memory_now
from ..doctor.kernel_verdict import KernelVerdict
from ..doctor.look import report
from ..doctor.paint import picture
from ..doctor.report import as_text
from ..doctor.store import home
from ..kernels import KERNELS
from .comfyui import switched_off
from .process import PACK, kernels, machine, verdicts
from .server import say_on_node


def current_verdicts() -> dict[str, KernelVerdict]:
    """The verdict on each of KERNELS; those that are not known yet are waited for, unless the user stops the prompt."""
    waited: list[str] = []

    def say(name: str) -> None:
        waited.append(name)
        say_on_node(f"trying {', '.join(waited)} in child processes")

    stop = comfy.model_management.throw_exception_if_processing_interrupted
    return verdicts().settle(machine().main_device.name, say, stop)


def _remarks() -> list[str] | None:
    """What is said about the machine as a whole; None: what the doctor says of itself."""
    said = []
    if switched_off():
        said.append("ATTUNE=off: the pack does nothing in this ComfyUI; its nodes pass models through.")
    if getattr(launch, "cpu", False):
        said.append("ComfyUI was started with --cpu: GPUs are not looked at.")
    return said or None


def look() -> tuple[str, Any]:
    """One look at this machine: the report as text, and as a picture (H, W, 3), uint8."""
    own = {kernel.name for kernel in KERNELS}
    elsewhere = [row for row in kernel_rows(kernels(), machine()) if row["name"] not in own]
    found = report(
        KERNELS, current_verdicts(), with_memory_now(machine()), PACK, home(), elsewhere=elsewhere, said=_remarks()
    )
    return as_text(found), picture(found)
