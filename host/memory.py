"""How much memory a call may take without raising the peak of what this process has had."""

from __future__ import annotations

from pathlib import Path

import torch

try:
    import psutil
except ImportError:  # ComfyUI brings it
    psutil = None

_FLOOR = 32 * 2**20  # on a CPU: what comes and goes there anyway, below what anybody could see


def spare_bytes(device: str) -> int | None:
    """Bytes on `device` between what is in use and the peak so far; None where nobody knows.

    CUDA: by torch's allocator, since somebody last reset its peak. CPU: of the whole process.
    """
    here = torch.device(device)
    if here.type == "cuda":
        return torch.cuda.max_memory_allocated(here) - torch.cuda.memory_allocated(here)
    if here.type != "cpu":
        return None
    return max(_FLOOR, _process_spare())


def _process_spare() -> int:
    """Peak less present memory of the process, 0 where the system does not tell it."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "Vm" in name}
        return 1024 * (kib["VmHWM"] - kib["VmRSS"])
    except (OSError, ValueError, KeyError, IndexError):  # not Linux
        pass
    memory = psutil.Process().memory_info() if psutil else None
    return getattr(memory, "peak_wset", 0) - getattr(memory, "wset", 0)  # Windows has these
