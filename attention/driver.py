"""What a GPU's driver tells without being started: its version, and how much memory is free now.

NVIDIA's through its management library (NVML), AMD's on Linux through /sys. Neither makes a CUDA or HIP context, and
neither is there on every machine: what cannot be told is "" or 0, and nothing here raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Address(NamedTuple):
    """How the driver knows a GPU, "" where torch does not say: its UUID without a prefix, and its place on the bus."""

    uuid: str = ""
    pci: str = ""


class Said(NamedTuple):
    """The driver's version as its vendor writes it, and bytes of free memory, by the caller's names of the GPUs."""

    driver: str = ""
    free: Mapping[str, int] = {}


# Source: NVML's API reference, and nvml.h of the CUDA toolkit. All functions return 0 for success.
class Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


_TEXT = 96  # more than NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE


def _library() -> Any:
    """NVML, or None where there is no NVIDIA driver. On Windows only from the folders where the driver puts it."""
    names = ["libnvidia-ml.so.1"]
    if os.name == "nt":
        names = [
            os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvml.dll"),
            os.path.join(
                os.environ.get("PROGRAMFILES", r"C:\Program Files"), "NVIDIA Corporation", "NVSMI", "nvml.dll"
            ),
        ]
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _free(library: Any, address: Address) -> int:
    """Bytes that are free on one GPU; 0 where NVML does not know it."""
    handle = ctypes.c_void_p()
    found = False
    if address.uuid:  # a part of a GPU (MIG) has a UUID of its own
        wanted = [address.uuid] if address.uuid.startswith(("GPU-", "MIG-")) else []
        for uuid in wanted or (f"GPU-{address.uuid}", f"MIG-{address.uuid}"):
            found = found or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) == 0
    if not found and address.pci:
        found = library.nvmlDeviceGetHandleByPciBusId_v2(address.pci.encode(), ctypes.byref(handle)) == 0
    memory = Memory()
    if not found or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return 0
    return int(memory.free)


def ask_nvidia(gpus: Mapping[str, Address], library: Any = None) -> Said:
    """What NVIDIA's driver says. `library`: NVML as ctypes loads it, where it is not the one of this machine."""
    try:
        library = library or _library()
        if library is None or library.nvmlInit_v2() != 0:
            return Said()
        try:
            text = ctypes.create_string_buffer(_TEXT)
            known = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(_TEXT)) == 0
            free = {name: _free(library, address) for name, address in gpus.items()}
        finally:
            library.nvmlShutdown()
    except (AttributeError, OSError):  # an NVML without one of these functions; a fault in it, on Windows
        return Said()
    return Said(text.value.decode("utf-8", "replace") if known else "", {name: n for name, n in free.items() if n})


def _read(file: Path) -> str:
    try:
        return file.read_text("ascii", "replace").strip()
    except OSError:
        return ""


def ask_amd(gpus: Mapping[str, Address], sys_folder: Path = Path("/sys")) -> Said:
    """What the amdgpu driver says on Linux; only its DKMS builds have a version of their own."""
    # Source: the Linux kernel's documentation of amdgpu, "Driver Misc Information" (mem_info_vram_total and _used).
    free = {}
    for name, (_uuid, pci) in gpus.items():
        folder = sys_folder / "bus" / "pci" / "devices" / pci
        numbers = [_read(folder / f"mem_info_vram_{what}") for what in ("total", "used")] if pci else []
        if numbers and all(number.isdigit() for number in numbers):
            free[name] = int(numbers[0]) - int(numbers[1])
    return Said(_read(sys_folder / "module" / "amdgpu" / "version"), free)


def pci_address(parts: Iterable[int | None]) -> str:
    """ "0000:01:00.0" from (domain, bus, device); "" where one of them is not known."""
    known = [part for part in parts if isinstance(part, int)]
    return "{:04x}:{:02x}:{:02x}.0".format(*known) if len(known) == 3 else ""
