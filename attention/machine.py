"""The machine as plain data, and the one function that reads it.

Nothing here imports an attention package: what is installed is told by its metadata and its files.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

import torch

from .builds import PACKAGES, Build, find_spec, installed_version, read_build
from .driver import Said, ask_amd, ask_nvidia, gpu_address


class Architecture(Enum):
    """GPU families that attention kernels tell apart, from the compute capability and never from a name."""

    CPU = "CPU"
    PRE_VOLTA = "before Volta"
    VOLTA = "Volta"
    TURING = "Turing"
    AMPERE = "Ampere"
    ADA = "Ada"
    HOPPER = "Hopper"
    BLACKWELL_DATACENTER = "Blackwell (data center)"
    BLACKWELL_CONSUMER = "Blackwell (consumer)"
    AMD = "AMD"
    INTEL = "Intel"
    APPLE = "Apple"
    OTHER = "unknown"


# Source: NVIDIA's CUDA C++ programming guide, "Compute Capabilities".
_NVIDIA: tuple[tuple[tuple[int, int], Architecture], ...] = (
    ((12, 0), Architecture.BLACKWELL_CONSUMER),
    ((10, 0), Architecture.BLACKWELL_DATACENTER),
    ((9, 0), Architecture.HOPPER),
    ((8, 9), Architecture.ADA),
    ((8, 0), Architecture.AMPERE),
    ((7, 5), Architecture.TURING),
    ((7, 0), Architecture.VOLTA),
    ((0, 0), Architecture.PRE_VOLTA),
)


@dataclass(frozen=True, slots=True)
class Device:
    """One device: `name` as torch writes it ("cuda:0", "cpu"), the vendor's `title`, memory in bytes.

    `free`: bytes that nobody held when the machine was read, 0 where the driver does not say. `gfx`: AMD's name of the
    architecture ("gfx1100").
    """

    name: str
    title: str
    architecture: Architecture
    capability: tuple[int, int] | None = None
    memory: int = 0
    free: int = 0
    gfx: str = ""

    @property
    def type(self) -> str:
        return self.name.partition(":")[0]

    def like(self, other: Device) -> bool:
        """Would a kernel behave alike on both?"""
        mine, theirs = ((d.type, d.title, d.capability, d.memory) for d in (self, other))
        return mine == theirs

    @property
    def sm(self) -> str:
        """ "sm_90" and the like; empty where the device has no compute capability."""
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.capability else ""

    @property
    def kind(self) -> str:
        """The architecture in words, with its number: "Hopper, sm_90", "AMD, gfx1100", "CPU"."""
        return ", ".join(part for part in (self.architecture.value, self.sm or self.gfx) if part)

    @property
    def room(self) -> str:
        """Its memory in words: "24.0 GiB, 22.1 free"; "" where it is not known."""
        free = f", {self.free / 2**30:.1f} free" if self.free else ""
        return f"{self.memory / 2**30:.1f} GiB{free}" if self.memory else ""


CPU = Device("cpu", platform.processor() or platform.machine() or "CPU", Architecture.CPU)


class Fetched(NamedTuple):
    """A prebuilt kernel that the user fetched: its folder, and why it cannot be used here ("" where it can)."""

    folder: str
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a decision may know about the machine. Versions are as the packages write them; None: not there.

    `packages` maps import names to versions ("" where installed without metadata). `host_attention` is the host's
    own attention function, `host_flag` the launch flag that chose it (both "" without a host). `fetched` maps names of
    kernels to what the user fetched for them, which takes the place of a package that is not installed. `driver` is the
    GPU driver's version, "" where it does not say; `builds` tells by import name how packages were built.
    """

    devices: tuple[Device, ...] = (CPU,)
    system: str = "Linux"
    python: str = "3.11"
    torch: str = ""
    cuda: str | None = None
    triton: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    host_attention: str = ""
    host_flag: str = ""
    fetched: Mapping[str, Fetched] = field(default_factory=dict)
    driver: str = ""
    builds: Mapping[str, Build] = field(default_factory=dict)

    def device(self, name: str) -> Device:
        """The device called `name`; one that is not known is of an unknown architecture."""
        for device in self.devices:
            if device.name == name or (":" not in name and device.type == name):
                return device
        return Device(name, name, Architecture.OTHER)

    @property
    def main_device(self) -> Device:
        """Where models run: the first device that is not the CPU, else the CPU."""
        return next((d for d in self.devices if d.type != "cpu"), self.devices[0])


# First choices per architecture: (exact, fast). Measured speeds and their sources: docs/kernels.md.
# SageAttention's Triton path gives NaN on some Ampere cards and is never chosen on its own. Our own 8-bit kernel has
# not been timed on any GPU: it stands behind what always runs, so that only a measurement can choose it.
_ON_CPU = ("sdpa", "sdpa_flash", "split", "sdpa_math")
_TABLE: dict[Architecture, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Architecture.HOPPER: (
        ("flash3", "sdpa_cudnn", "flash2", "sdpa"),
        ("sage2_fp8_cuda", "flash3", "sdpa_cudnn", "sdpa", "attune_int8"),
    ),
    Architecture.BLACKWELL_DATACENTER: (("flash4", "sdpa"), ("flash4", "kitchen_int8", "sdpa", "attune_int8")),
    Architecture.BLACKWELL_CONSUMER: (
        ("flash2", "sdpa"),
        ("sage2_fp8_cuda_pp", "sage2_fp8_cuda", "kitchen_int8", "flash2", "sdpa", "attune_int8"),
    ),
    Architecture.ADA: (
        ("flash2", "xformers", "sdpa"),
        ("sage2_fp8_cuda_pp", "sage2_fp8_cuda", "kitchen_int8", "sage1", "flash2", "xformers", "sdpa", "attune_int8"),
    ),
    Architecture.AMPERE: (
        ("flash2", "xformers", "sdpa"),
        ("sage2_fp16_cuda", "kitchen_int8", "sage1", "flash2", "xformers", "sdpa", "attune_int8"),
    ),
    Architecture.TURING: (("xformers", "sdpa"), ("kitchen_int8", "xformers", "sdpa")),
    Architecture.VOLTA: (("xformers", "sdpa"), ("xformers", "sdpa")),
    Architecture.CPU: (_ON_CPU, _ON_CPU),
}
_ELSEWHERE: tuple[tuple[str, ...], tuple[str, ...]] = (("sdpa",), ("sdpa",))


def first_choices(architecture: Architecture, fast: bool) -> tuple[str, ...]:
    """Kernel names to try, best first; every one may still be refused."""
    return _TABLE.get(architecture, _ELSEWHERE)[1 if fast else 0]


def nvidia_architecture(capability: tuple[int, int]) -> Architecture:
    return next(architecture for least, architecture in _NVIDIA if capability >= least)


def installed_packages() -> dict[str, str]:
    """Import name → version of every attention package that is installed. Imports none of them."""
    return {name: installed_version(name) for name in PACKAGES if find_spec(name) is not None}


_fetched: dict[str, Fetched] = {}


def offer_fetched(fetched: Mapping[str, Fetched]) -> None:
    """Say which kernels the user has fetched. Call it before read_machine(); it replaces what was said before."""
    _fetched.clear()
    _fetched.update({name: Fetched(*entry) for name, entry in fetched.items()})  # lists, once they have been JSON


def fetched_kernel(name: str) -> Fetched | None:
    """What was fetched for the kernel `name`, as offer_fetched() was told."""
    return _fetched.get(name)


def _cuda_devices() -> tuple[list[Device], Said]:
    """What torch calls cuda devices: NVIDIA's, or AMD's in its builds for ROCm. And what their driver says."""
    devices, addresses = [], {}
    hip = torch.version.hip is not None
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        device = Device(
            f"cuda:{index}",
            properties.name,
            Architecture.AMD if hip else nvidia_architecture(capability),
            None if hip else capability,
            properties.total_memory,
            gfx=str(getattr(properties, "gcnArchName", "")).partition(":")[0] if hip else "",
        )
        devices.append(device)
        addresses[device.name] = gpu_address(properties)
    said = (ask_amd if hip else ask_nvidia)(addresses)
    return [replace(device, free=said.free.get(device.name, 0)) for device in devices], said


def _xpu_devices() -> tuple[list[Device], str]:
    """Intel's GPUs, and their driver's version."""
    devices, driver = [], ""
    for index in range(torch.xpu.device_count()):
        properties = torch.xpu.get_device_properties(index)
        driver = driver or str(getattr(properties, "driver_version", ""))
        memory = int(getattr(properties, "total_memory", 0))
        devices.append(Device(f"xpu:{index}", properties.name, Architecture.INTEL, memory=memory))
    return devices, driver


def _read_devices() -> tuple[list[Device], str]:
    """(GPUs, version of their driver). NVIDIA's driver is asked also where torch sees none of its GPUs."""
    if torch.cuda.is_available():
        devices, said = _cuda_devices()
        return devices, said.driver
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return _xpu_devices()
    if torch.backends.mps.is_available():
        return [Device("mps", "Apple GPU", Architecture.APPLE)], ""
    return [], ask_nvidia({}).driver


def read_machine(host_attention: str = "", host_flag: str = "", gpus: bool = True) -> Machine:
    """Read this machine. Asks the GPU driver where there is one; with `gpus` False no GPU is looked at or started."""
    devices, driver = _read_devices() if gpus else ([], "")
    packages = installed_packages()
    return Machine(
        devices=(*devices, CPU),
        system=platform.system(),
        python=".".join(map(str, sys.version_info[:3])),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=packages.get("triton"),
        packages=packages,
        host_attention=host_attention,
        host_flag=host_flag,
        fetched=dict(_fetched),
        driver=driver,
        builds={name: read_build(name) for name in packages},
    )


def with_memory_now(machine: Machine) -> Machine:
    """`machine`, with the memory that is free on its GPUs now."""
    if machine.main_device.type == "cpu":
        return machine
    return replace(machine, devices=(*_read_devices()[0], CPU))
