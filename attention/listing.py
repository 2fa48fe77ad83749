"""Every kernel that has a name, and whether it can run on a machine: what `attune kernels` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kernel import Kernel, machine_reasons
from .machine import Machine

# Kernels that have a name and are not there outside ComfyUI.
_ELSEWHERE = {
    "sub_quad": ("ComfyUI sub-quadratic attention", "comfyui", "exact", "exists only inside ComfyUI"),
    "basic": ("ComfyUI basic attention", "comfyui", "exact", "exists only inside ComfyUI"),
}


def kernel_rows(
    kernels: Mapping[str, Kernel], machine: Machine, verdicts: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One row per kernel: {name, title, package, precision, status, reasons, verdict}.

    `status` is "available", "not installed" or "unsupported"; `reasons` says why not, judged without running anything.
    `verdict` is what `verdicts` says of the kernel: how it did when it was run; "" where that says nothing.
    """
    rows = []
    for name, kernel in kernels.items():
        reasons = list(machine_reasons(kernel, machine))
        missing = kernel.package not in ("", "torch") and kernel.package not in machine.packages
        status = "available" if not reasons else "not installed" if missing else "unsupported"
        rows.append(
            {
                "name": name,
                "title": kernel.title,
                "package": kernel.package,
                "precision": kernel.precision,
                "status": status,
                "reasons": reasons,
                "verdict": (verdicts or {}).get(name, ""),
            }
        )
    for name, (title, package, precision, reason) in _ELSEWHERE.items():
        if name not in kernels:
            row = {"name": name, "title": title, "package": package, "precision": precision}
            rows.append({**row, "status": "unsupported", "reasons": [reason], "verdict": ""})
    return rows
