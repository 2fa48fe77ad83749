"""Which build of a package fits this machine, as a command; nothing where none is known."""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..attention.kernel import Kernel, machine_reasons
from ..attention.machine import Device, Machine
from .hub import OFFERS
from .prebuilt import BUILDING, PREBUILT, Prebuilt


@dataclass(frozen=True)
class Place:
    """Where a command would be typed: the Python that runs this, the kind of CPU, and the pack's folder."""

    python: str = "python"
    cpu: str = "x86_64"
    pack: str = "ComfyUI-Attune"


def read_place(pack: Path) -> Place:
    return Place(sys.executable or "python", platform.machine(), str(pack))


@dataclass(frozen=True)
class Cure:
    """What to do, in words; `command` to type, "" where none is known; `source` of both."""

    text: str
    command: str = ""
    source: str = ""


def numbers(version: str) -> tuple[int, ...]:
    """(2, 11, 0) of "2.11.0+cu130"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def this(machine: Machine, place: Place) -> str:
    """The machine in words, as far as a wheel depends on it."""
    cuda = f"CUDA {machine.cuda}" if machine.cuda else "no CUDA"
    python = ".".join(machine.python.split(".")[:2])
    return f"Python {python}, {machine.system} {place.cpu}, PyTorch {machine.torch}, {cuda}"


def _fits(build: Prebuilt, machine: Machine, place: Place) -> bool:
    python, torch = numbers(machine.python)[:2], numbers(machine.torch)
    low, high = build.torch
    return (
        (not build.systems or (machine.system, place.cpu) in build.systems)
        and build.python[0] <= python <= build.python[1]
        and low <= torch[: max(len(low), 2)]
        and torch[: len(high)] <= high
        and (not build.cuda or machine.cuda in build.cuda)
    )


def _quoted(python: str) -> str:
    return f'"{python}"' if " " in python else python


def prebuilt(package: str, machine: Machine, place: Place, kernel: Kernel | None, device: Device) -> Cure | None:
    """The newest known build of `package` for this machine that `kernel` would then accept by its own rules."""
    for build in reversed(PREBUILT):
        if build.package != package or not _fits(build, machine, place):
            continue
        if kernel is not None:
            after = dataclasses.replace(
                machine, packages={**machine.packages, package: build.version}, triton=machine.triton or "3"
            )
            if machine_reasons(kernel, after, device):
                continue
        cuda = (machine.cuda or "").replace(".", "")
        arguments = build.arguments.format(cuda=cuda)
        return Cure(
            "Install the build that fits here:", f"{_quoted(place.python)} -m pip install {arguments}", build.source
        )
    return None


def install(kernel: Kernel, machine: Machine, place: Place, device: Device, repair: bool = False) -> Cure:
    """How to get a build of the kernel's package that fits. repair: one is there, and is broken."""
    found = prebuilt(kernel.package, machine, place, kernel, device)
    if found is not None and repair:
        command = found.command.replace("pip install", "pip install --force-reinstall --no-deps", 1)
        command = command.replace("--no-deps --no-deps", "--no-deps")
        return Cure("Replace it by a build that fits here:", command, found.source)
    if found is not None:
        return found
    if kernel.package in ("", "torch"):
        return Cure("It is part of PyTorch: only another version of PyTorch changes it.", source=kernel.url)
    text = f"No prebuilt of it is known for {this(machine, place)}."
    if kernel.name in OFFERS and not repair:
        text += " The Hugging Face Hub offers builds; this looks whether one of them fits, and asks before it fetches:"
        command = f"{_quoted(place.python)} {_quoted(place.pack)} get {kernel.name}"
        return Cure(text, command, f"huggingface.co/{OFFERS[kernel.name].repo}")
    if "pip install" not in kernel.install and kernel.install:
        text += (
            f" What remains is to {kernel.install}, with a compiler and the CUDA toolkit that PyTorch was built for."
        )
    more = BUILDING.get((kernel.package, machine.system), "")
    return Cure(f"{text} {more}".rstrip(), source=kernel.url)


def triton(machine: Machine, place: Place, device: Device) -> Cure:
    """The Triton that belongs to this PyTorch."""
    found = prebuilt("triton", machine, place, None, device)
    if found is not None:
        return dataclasses.replace(found, text="Install the Triton that belongs to this PyTorch:")
    return Cure(
        f"No prebuilt of Triton is known for {this(machine, place)}.", source="github.com/woct0rdho/triton-windows"
    )


def nothing_helps(kernel: Kernel, machine: Machine, device: Device) -> tuple[str, ...]:
    """The reasons that stay whatever version of the kernel's package is installed: the GPU, the OS, PyTorch's CUDA."""
    packages = {kernel.package: ""} if kernel.package not in ("", "torch") else {}
    return machine_reasons(kernel, dataclasses.replace(machine, packages=packages, triton="3"), device)
