"""The machine as plain data, and the one function that reads it.

Nothing here imports an attention package: what is installed is told by its metadata and its import spec.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch


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
    """One device: `name` as torch writes it ("cuda:0", "cpu"), the vendor's `title`, memory in bytes."""

    name: str
    title: str
    architecture: Architecture
    capability: tuple[int, int] | None = None
    memory: int = 0

    @property
    def type(self) -> str:
        return self.name.partition(":")[0]

    @property
    def sm(self) -> str:
        """ "sm_90" and the like; empty where the device has no compute capability."""
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.capability else ""


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
    kernels to what the user fetched for them, which takes the place of a package that is not installed.
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
# SageAttention's Triton path gives NaN on some Ampere cards and is never chosen on its own.
_TABLE: dict[Architecture, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Architecture.HOPPER: (
        ("flash3", "sdpa_cudnn", "flash2", "sdpa"),
        ("sage2_fp8_cuda", "flash3", "sdpa_cudnn", "sdpa"),
    ),
    Architecture.BLACKWELL_DATACENTER: (("flash4", "sdpa"), ("flash4", "kitchen_int8", "sdpa")),
    Architecture.BLACKWELL_CONSUMER: (
        ("flash2", "sdpa"),
        ("sage2_fp8_cuda_pp", "sage2_fp8_cuda", "kitchen_int8", "flash2", "sdpa"),
    ),
    Architecture.ADA: (
        ("flash2", "xformers", "sdpa"),
        ("sage2_fp8_cuda_pp", "sage2_fp8_cuda", "kitchen_int8", "sage1", "flash2", "xformers", "sdpa"),
    ),
    Architecture.AMPERE: (
        ("flash2", "xformers", "sdpa"),
        ("sage2_fp16_cuda", "kitchen_int8", "sage1", "flash2", "xformers", "sdpa"),
    ),
    Architecture.TURING: (("xformers", "sdpa"), ("kitchen_int8", "xformers", "sdpa")),
    Architecture.VOLTA: (("xformers", "sdpa"), ("xformers", "sdpa")),
}
_ELSEWHERE: tuple[tuple[str, ...], tuple[str, ...]] = (("sdpa",), ("sdpa",))


def first_choices(architecture: Architecture, fast: bool) -> tuple[str, ...]:
    """Kernel names to try, best first; every one may still be refused."""
    return _TABLE.get(architecture, _ELSEWHERE)[1 if fast else 0]


def nvidia_architecture(capability: tuple[int, int]) -> Architecture:
    return next(architecture for least, architecture in _NVIDIA if capability >= least)


# Import name → distribution names that carry it.
PACKAGES: dict[str, tuple[str, ...]] = {
    "xformers": ("xformers",),
    "flash_attn": ("flash-attn", "flash_attn"),
    "flash_attn_interface": ("flash-attn-3", "flash_attn_3", "flashattn-hopper"),
    "flash_attn.cute": ("flash-attn-4", "flash_attn_4", "flash-attn-cute"),
    "sageattention": ("sageattention",),
    "sageattn3": ("sageattn3",),
    "comfy_kitchen": ("comfy-kitchen", "comfy_kitchen"),
    "triton": ("triton", "triton-windows"),
}


def _installed(name: str) -> bool:
    """Is `name` importable, judged without running any of its code or its parents' code?"""
    parts = name.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
        for depth in range(1, len(parts)):
            if spec is None or spec.submodule_search_locations is None:
                return False
            spec = importlib.machinery.PathFinder.find_spec(
                ".".join(parts[: depth + 1]), list(spec.submodule_search_locations)
            )
    except (ImportError, ValueError):  # ValueError: a module that was put into sys.modules without a spec
        return False
    return spec is not None


def _version(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def installed_packages() -> dict[str, str]:
    """Import name → version of every attention package that is installed. Imports none of them."""
    return {name: _version(dists) for name, dists in PACKAGES.items() if _installed(name)}


_fetched: dict[str, Fetched] = {}


def offer_fetched(fetched: Mapping[str, Fetched]) -> None:
    """Say which kernels the user has fetched. Call it before read_machine(); it replaces what was said before."""
    _fetched.clear()
    _fetched.update({name: Fetched(*entry) for name, entry in fetched.items()})  # lists, once they have been JSON


def fetched_kernel(name: str) -> Fetched | None:
    """What was fetched for the kernel `name`, as offer_fetched() was told."""
    return _fetched.get(name)


def _cuda_devices() -> list[Device]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        hip = torch.version.hip is not None
        architecture = Architecture.AMD if hip else nvidia_architecture(capability)
        devices.append(
            Device(
                f"cuda:{index}",
                properties.name,
                architecture,
                None if hip else capability,
                properties.total_memory,
            )
        )
    return devices


def read_machine(host_attention: str = "", host_flag: str = "", gpus: bool = True) -> Machine:
    """Read this machine. Asks the GPU driver where there is one; with `gpus` False no GPU is looked at or started."""
    devices: list[Device] = []
    if gpus and torch.cuda.is_available():
        devices += _cuda_devices()
    if gpus and hasattr(torch, "xpu") and torch.xpu.is_available():
        devices += [
            Device(f"xpu:{i}", torch.xpu.get_device_name(i), Architecture.INTEL)
            for i in range(torch.xpu.device_count())
        ]
    if gpus and torch.backends.mps.is_available():
        devices.append(Device("mps", "Apple GPU", Architecture.APPLE))
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
    )
