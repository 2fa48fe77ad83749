"""The command `attune`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .attention.kernel import Kernel, machine_reasons
from .attention.machine import Machine, read_machine

# Kernels that have a name and are not there: outside ComfyUI, or in this version.
_ELSEWHERE = {
    "sub_quad": ("ComfyUI sub-quadratic attention", "comfyui", "exact", "exists only inside ComfyUI"),
    "basic": ("ComfyUI basic attention", "comfyui", "exact", "exists only inside ComfyUI"),
    "attune_int8": ("Our own 8-bit Triton kernel", "", "lossy", "is not part of this version yet"),
}


def kernel_rows(kernels: dict[str, Kernel], machine: Machine) -> list[dict[str, Any]]:
    """One row per kernel: {name, title, package, precision, status, reasons}.

    `status` is "available", "not installed" or "unsupported"; `reasons` says why not. Nothing has been run.
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
            }
        )
    for name, (title, package, precision, reason) in _ELSEWHERE.items():
        if name not in kernels:
            row = {"name": name, "title": title, "package": package, "precision": precision}
            rows.append({**row, "status": "unsupported", "reasons": [reason]})
    return rows


def _print_table(rows: list[dict[str, Any]], machine: Machine) -> None:
    device = machine.main_device
    print(f"{device.title} ({device.architecture.value}{', ' + device.sm if device.sm else ''}), torch {machine.torch}")
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(
            f"{row['name']:<{width}}  {row['precision']:<6}  {row['status']:<13}  {'; '.join(row['reasons'])}".rstrip()
        )


def _kernels(options: argparse.Namespace) -> int:
    from .kernels import KERNELS

    machine = read_machine()
    rows = kernel_rows({kernel.name: kernel for kernel in KERNELS}, machine)
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        _print_table(rows, machine)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="attune", description="Attention that tunes itself.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    kernels = commands.add_parser("kernels", help="every attention kernel, and whether it can run on this machine")
    kernels.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    kernels.set_defaults(run=_kernels)
    options = parser.parse_args(arguments)
    return int(options.run(options))
