"""What a result says of the machine, and how much memory it has left."""

from __future__ import annotations

import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..attention.driver import Sense, gpu_address, sense_amd, sense_nvidia
from ..attention.machine import Machine

try:
    import psutil
except ImportError:  # ComfyUI brings it
    psutil = None

_ASSUMED = 4 * 2**30  # free memory where nothing tells it
_LEFT = 0.9  # share of the free memory that may be used: the CPU's is shared with everything else


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def free_bytes(device: torch.device) -> int:
    """Memory that a call may take on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((torch.cuda.mem_get_info(device)[0] + unused) * _LEFT)
    if device.type == "cpu" and psutil is not None:
        return int(psutil.virtual_memory().available * _LEFT)
    return _ASSUMED


def sensing(device: torch.device) -> AbstractContextManager[Sense | None]:
    """Within it: what reads the device's clock in MHz and its power in W; None for a device without a driver to ask."""
    if device.type != "cuda":
        return nullcontext()
    address = gpu_address(torch.cuda.get_device_properties(device))
    return nullcontext(lambda: sense_amd(address)) if torch.version.hip else sense_nvidia(address)


def processor() -> str:
    """The CPU's name as its maker writes it, or at least its kind: platform.processor() knows little of it."""
    try:
        if sys.platform == "win32":
            import winreg

            place = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, place) as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:  # no Linux, or not allowed: there is a name all the same
        pass
    return platform.processor() or platform.machine() or "CPU"


def machine_data(machine: Machine, device: str) -> dict[str, Any]:
    """The machine for a file that is passed on: no names of users or hosts, no paths."""
    chosen = machine.device(device)
    return {
        "device": processor() if chosen.type == "cpu" else chosen.title or chosen.name,
        "device_name": chosen.name,
        "architecture": chosen.kind,
        "memory_bytes": chosen.memory or None,
        "threads": torch.get_num_threads() if chosen.type == "cpu" else None,
        "driver": machine.driver if chosen.type != "cpu" else "",
        "torch": machine.torch,
        "cuda": machine.cuda or "",
        "triton": machine.triton or "",
        "python": machine.python,
        "system": f"{machine.system} {platform.machine()}",
        "packages": {name: version for name, version in sorted(machine.packages.items())},
        "fetched": sorted(machine.fetched),
    }
