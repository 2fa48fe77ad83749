"""What a GPU's driver tells without starting a GPU: its version, and the free memory, clock and power of each one.

NVIDIA's through its management library (NVML), AMD's on Linux through /sys. Neither makes a CUDA or HIP context, and
neither is there on every machine: what cannot be told is "" or 0, and nothing here raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Address(NamedTuple):
    """How the driver knows a GPU, "" where torch does not say: its UUID without a prefix, and its place on the bus."""

    uuid: str = ""
    pci: str = ""


# Reads a GPU's clock in MHz and its power in W, each None where the driver does not tell.
Sense = Callable[[], tuple[float | None, float | None]]


class Said(NamedTuple):
    """The driver's version as its vendor writes it, and bytes of free memory, by the caller's names of the GPUs."""

    driver: str = ""
    free: Mapping[str, int] = {}


# Source: NVML's API reference, and nvml.h of the CUDA toolkit. All functions return 0 for success.
class Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


_TEXT = 96  # more than NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
_CLOCK_SM = 1  # NVML_CLOCK_SM


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


def _handle(library: Any, address: Address) -> Any:
    """NVML's name of one GPU; None where it does not know it."""
    handle = ctypes.c_void_p()
    found = False
    if address.uuid:  # a part of a GPU (MIG) has a UUID of its own
        wanted = [address.uuid] if address.uuid.startswith(("GPU-", "MIG-")) else []
        for uuid in wanted or (f"GPU-{address.uuid}", f"MIG-{address.uuid}"):
            found = found or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) == 0
    if not found and address.pci:
        found = library.nvmlDeviceGetHandleByPciBusId_v2(address.pci.encode(), ctypes.byref(handle)) == 0
    return handle if found else None


def _free(library: Any, address: Address) -> int:
    """Bytes that are free on one GPU; 0 where NVML does not know it."""
    handle, memory = _handle(library, address), Memory()
    if handle is None or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
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


@contextlib.contextmanager
def sense_nvidia(address: Address, library: Any = None) -> Iterator[Sense]:
    """What reads the clock of a GPU's SMs and its power, for as long as the context lasts: starting NVML takes longer
    than most calls that are to be watched. Newer GPUs tell the power's mean over a second (NVML's API reference).
    """
    library, handle, started = library or _library(), None, False
    with contextlib.suppress(AttributeError, OSError):  # as in ask_nvidia
        started = library is not None and library.nvmlInit_v2() == 0
        handle = _handle(library, address) if started else None

    def ask(function: str, *which: Any) -> int | None:
        number = ctypes.c_uint()
        with contextlib.suppress(AttributeError, OSError):
            if handle is not None and getattr(library, function)(handle, *which, ctypes.byref(number)) == 0:
                return number.value
        return None

    def sense() -> tuple[float | None, float | None]:
        clock = ask("nvmlDeviceGetClockInfo", ctypes.c_int(_CLOCK_SM))  # MHz
        power = ask("nvmlDeviceGetPowerUsage")  # mW
        return clock, None if power is None else power / 1000

    try:
        yield sense
    finally:
        with contextlib.suppress(AttributeError, OSError):
            if started:
                library.nvmlShutdown()


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


def sense_amd(address: Address, sys_folder: Path = Path("/sys")) -> tuple[float | None, float | None]:
    """The clock of a GPU's compute units in MHz and its power in W, as the amdgpu driver tells them on Linux."""
    # Source: the Linux kernel's documentation of amdgpu, "HWMON Interfaces": hertz and microwatts.
    folder = sys_folder / "bus" / "pci" / "devices" / (address.pci or "-") / "hwmon"

    def read(*names: str) -> float | None:
        told = [_read(file) for name in names for file in sorted(folder.glob(f"hwmon*/{name}"))]
        return next((int(number) / 1_000_000 for number in told if number.isdigit()), None)

    return read("freq1_input"), read("power1_average", "power1_input")


def gpu_address(properties: Any) -> Address:
    """Where the driver finds a GPU of torch's, from its device properties. Older versions of torch do not say all."""
    pci = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    return Address(str(getattr(properties, "uuid", "")), pci_address(pci))


def pci_address(parts: Iterable[int | None]) -> str:
    """ "0000:01:00.0" from (domain, bus, device); "" where one of them is not known."""
    known = [part for part in parts if isinstance(part, int)]
    return "{:04x}:{:02x}:{:02x}.0".format(*known) if len(known) == 3 else ""
