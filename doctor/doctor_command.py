"""The command `attune doctor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from .store import home

# The environment variables that a bug report may show: settings of ours and of what attention depends on.
_SHOWN = ("ATTUNE", "COMFYUI_ATTENTION", "CUDA_", "PYTORCH_", "TORCH", "TRITON_", "XFORMERS_", "FLASH_ATTENTION_")


def _print(text: str) -> None:
    """Print what others wrote: a console may not have all its letters."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))


def bundle(report: Any, data: dict[str, Any]) -> dict[str, Any]:
    """What a bug report needs beside the findings."""
    from .report import as_text, scrub

    packages = {f"{found.metadata['Name']} {found.version}" for found in distributions()}
    environment = {name: value for name, value in os.environ.items() if name.startswith(_SHOWN)}
    made = {
        "kind": "attune doctor bundle",
        "schema": 1,
        "text": as_text(report),
        **data,
        "packages": sorted(packages, key=str.lower),
        "environment": environment,
    }
    cleaned: dict[str, Any] = scrub(made)
    return cleaned


def _doctor(options: argparse.Namespace) -> int:
    from ..attention.listing import kernel_rows
    from ..attention.machine import read_machine
    from .look import report
    from .probe import examine, stored
    from .report import as_json, as_text

    kernels, machine = options.kernels(), read_machine()
    known = [device.name for device in machine.devices]
    if options.device and options.device not in known:
        print(f"unknown device {options.device!r}: here are {', '.join(known)}", file=sys.stderr)
        return 2
    device = machine.device(options.device) if options.device else machine.main_device
    folder = options.home.absolute() if options.home else home(options.pack)
    ran = []

    def told(name: str, verdict: Any) -> None:
        if not verdict.reasons:
            ran.append(name)
            print(f"{name}: {verdict.outcome}", file=sys.stderr)

    count = len(kernels) if options.again else len(stored(kernels, machine, folder, device)[1])
    if count:
        print("Trying kernels in child processes (what was tried is kept until something changes):", file=sys.stderr)
    verdicts = examine(kernels, machine, options.pack, folder, device, again=options.again, told=told)
    if ran:
        print(file=sys.stderr)
    names = {kernel.name: kernel for kernel in kernels}
    elsewhere = [row for row in kernel_rows(names, machine) if row["name"] not in names]
    failed = options.failed(folder, names, machine)
    found = report(kernels, verdicts, machine, options.pack, folder, device, elsewhere=elsewhere, failed=failed)
    data = as_json(found)
    if options.bundle is not None:
        try:
            options.bundle.write_text(json.dumps(bundle(found, data), indent=2) + "\n", "utf-8")
        except OSError as error:
            print(f"{options.bundle} could not be written ({error})", file=sys.stderr)
            return 1
    if options.json:
        json.dump(data, sys.stdout, indent=2)
        print()
    else:
        _print(as_text(found))
        if options.bundle is not None:
            print(f"\nFor a bug report: {options.bundle} (look through it before you send it).")
    return 0


def add_doctor(commands: Any, pack: Path, kernels: Callable[[], Sequence[Any]], failed: Callable[..., Any]) -> None:
    """Add `doctor` to the parser's commands.

    pack: this pack's folder. kernels: gives all of them. failed: gives those that failed in models, as look.report()
    takes it, for the folder of the pack's state, the kernels by name and the machine.
    """
    about = "prove every attention kernel in a child process, and say what helps where one does not work"
    parser = commands.add_parser("doctor", help=about, description=about)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--bundle", type=Path, metavar="FILE", help="also write a file for a bug report, without names and tokens"
    )
    parser.add_argument("--again", action="store_true", help="try everything again, also what has not changed")
    parser.add_argument("--device", default="", help="the GPU to look at, as torch calls it: cuda:1")
    parser.add_argument(
        "--home", type=Path, help="the folder of the pack's state, where ComfyUI has another user directory"
    )
    parser.set_defaults(run=_doctor, pack=pack, kernels=kernels, failed=failed)
