"""The command `attune`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .attention.listing import kernel_rows
from .attention.machine import Machine, read_machine


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
