"""The doctor inside ComfyUI: what the node AttentionDoctor and the panel show."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import comfy.model_management
from comfy.cli_args import args as launch

from ..attention.listing import kernel_rows
from ..attention.machine import Machine, with_memory_now
from ..attention.plan import HOST, expand
from ..doctor.doctor_command import bundle as doctor_bundle
from ..doctor.env_file import VARIABLE
from ..doctor.kernel_verdict import KernelVerdict
from ..doctor.look import report
from ..doctor.paint import picture
from ..doctor.report import Report, as_json, as_text, device_line, host_line, versions
from ..doctor.store import home
from ..kernels import KERNELS
from .comfyui import default_account, switched_off
from .process import PACK, kernels, machine, verdicts
from .remembered import failed
from .server import say_on_node

_PACKAGE = __name__.partition(".host.")[0]
_MOST_LETTERS = 2000  # of what a kernel's process said
_NOT_YET = "It has not been tried yet: that is done in the background, while no prompt runs."


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


def _report(known: Mapping[str, KernelVerdict], here: Machine) -> Report:
    own = {kernel.name for kernel in KERNELS}
    elsewhere = [row for row in kernel_rows(kernels(), here) if row["name"] not in own]
    hurt = failed(home(), kernels(), here)
    return report(KERNELS, known, here, PACK, home(), elsewhere=elsewhere, said=_remarks(), failed=hurt)


def look() -> tuple[str, Any]:
    """One look at this machine: the report as text, and as a picture (H, W, 3), uint8."""
    found = _report(current_verdicts(), with_memory_now(machine()))
    return as_text(found), picture(found)


def _known() -> dict[str, KernelVerdict]:
    """The verdicts that are there by now. Switched off, the pack tries nothing and knows none."""
    return {} if switched_off() else verdicts().known(machine().main_device.name)


def kernel_table() -> list[dict[str, Any]]:
    """A row for each kernel in this process: can it run here, what did the probe find, why, and what helps.

    `outcome` is "open" where the probe is still to come, "" where there is none; `verdict` is its older name.
    """
    known = _known()
    found = {row["name"]: row for row in as_json(_report(known, machine()))["kernels"]}
    rows = []
    for row in kernel_rows(kernels(), machine()):
        told, verdict = found.get(row["name"]), known.get(row["name"])
        row |= {"outcome": "", "detail": "", "error": None, "allowed": None, "milliseconds": None, "timed": ""}
        row |= {"can_run_here": row["status"] == "available", "cause": "", "cure": None, "advice": ""}
        if told is not None:
            row |= {"can_run_here": told["can_run_here"], "advice": told["advice"]}
        if told is not None and verdict is not None:
            row |= {name: getattr(verdict, name) for name in ("outcome", "error", "allowed", "milliseconds", "timed")}
            row |= {"detail": verdict.detail[:_MOST_LETTERS], "cause": told["cause"]["text"], "cure": told["cure"]}
        elif told is not None and not switched_off():
            row |= {"outcome": "open", "cause": _NOT_YET}
        rows.append({**row, "verdict": row["outcome"]})
    return rows


def bundle() -> str:
    """What `attune doctor --bundle` writes: the findings so far without names, folders and tokens, as JSON."""
    found = _report(_known(), with_memory_now(machine()))
    return json.dumps(doctor_bundle(found, as_json(found)), indent=2) + "\n"


def _default_line(requested: str, known: Mapping[str, KernelVerdict]) -> str:
    """What computes attention without a node, and what `auto` tries first where it has measured nothing."""
    own = f"ComfyUI's own ({machine().host_attention or 'unknown'})"
    named = f"{requested} ({VARIABLE})" if requested else own
    first = next(name for name in expand("auto", machine()) if name == HOST or (name in known and known[name].works))
    return f"Without a node: {named}. First choice of auto: {own if first == HOST else first}."


def machine_account() -> dict[str, Any]:
    """The machine in four lines, and what is said about it: what the panel shows first."""
    here, known, default = machine(), _known(), default_account()
    driver = f", driver {here.driver}" if here.driver else ""
    return {
        "version": getattr(sys.modules.get(_PACKAGE), "__version__", ""),
        "comfyui": getattr(sys.modules.get("comfyui_version"), "__version__", ""),
        "off": switched_off(),
        "lines": [
            f"{device_line(here.main_device)}{driver}",
            ", ".join(part for part in versions(here) if not part.startswith("driver ")),
            host_line(here),
            _default_line(default["requested"], known),
        ],
        "default": default,
        "remarks": list(_report(known, here).remarks),
    }
