"""The clock and the power of a GPU while it is measured: from a pretended NVML, from /sys, and in a result's rows."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from test_bench import bench, kernel, right
from test_machine import INVALID_ARGUMENT, SUCCESS, UNINITIALIZED, UNKNOWN, UUID, Handle, Nvml

from comfyui_attune.attention import driver
from comfyui_attune.attention.driver import Address, gpu_address, sense_amd, sense_nvidia
from comfyui_attune.attention.machine import read_machine
from comfyui_attune.kernels import KERNELS
from comfyui_attune.measure import bench as module
from comfyui_attune.measure.bench import Bench, Case, run_bench
from comfyui_attune.measure.bench_machine import sensing
from comfyui_attune.measure.bench_table import table
from comfyui_attune.measure.shapes import Shape
from comfyui_attune.measure.timing import Effort

NOT_SUPPORTED, SM_CLOCK, WHOLE_GPU = 3, 1, 1  # nvml.h; the stand-in's GPU that is no part of one
HERE = Address(UUID)


class NvmlAtWork(Nvml):
    """The same, with a clock and a power that it tells of whole GPUs only."""

    def __init__(self, missing: str = "", **options) -> None:
        super().__init__(missing=missing, **options)
        self.clocks, self.milliwatts = {0: 300, SM_CLOCK: 1980, 2: 2619}, 612_500
        number = ctypes.POINTER(ctypes.c_uint)
        for name, arguments in {
            "nvmlDeviceGetClockInfo": (Handle, ctypes.c_int, number),
            "nvmlDeviceGetPowerUsage": (Handle, number),
        }.items():
            if name != missing:
                setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(getattr(self, f"_{name}")))

    def _tell(self, handle: int, number, value: int) -> int:
        if not self.running:
            return UNINITIALIZED
        if handle not in self.gpus:
            return INVALID_ARGUMENT
        if handle != WHOLE_GPU:
            return NOT_SUPPORTED
        number[0] = value
        return SUCCESS

    def _nvmlDeviceGetClockInfo(self, handle: int, kind: int, number) -> int:
        return self._tell(handle, number, self.clocks[kind]) if kind in self.clocks else INVALID_ARGUMENT

    def _nvmlDeviceGetPowerUsage(self, handle: int, number) -> int:
        return self._tell(handle, number, self.milliwatts)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (HERE, (1980, 612.5)),
        (Address("", "0000:01:00.0"), (1980, 612.5)),
        (Address("another", "0000:01:00.0"), (1980, 612.5)),
        (Address("aa-bb"), (None, None)),  # a part of a GPU has no clock of its own
        (Address("another", "0000:02:00.0"), (None, None)),
        (Address(), (None, None)),
    ],
)
def test_nvml_tells_clock_and_power_of_the_gpu_that_is_meant(address, told):
    nvml = NvmlAtWork()
    with sense_nvidia(address, nvml) as sense:
        assert sense() == told
        nvml.clocks[SM_CLOCK], nvml.milliwatts = 1200, 90_000
        assert sense() == (told if told == (None, None) else (1200, 90.0)), "it is read each time"
        assert nvml.running == 1
    assert nvml.running == 0 and nvml.calls == ["init"], "started once, however often it is asked, and shut down"


@pytest.mark.parametrize(
    ("nvml", "told"),
    [
        (NvmlAtWork(start=UNKNOWN), (None, None)),
        (NvmlAtWork(missing="nvmlInit_v2"), (None, None)),
        (NvmlAtWork(missing="nvmlDeviceGetHandleByUUID"), (None, None)),
        (NvmlAtWork(missing="nvmlDeviceGetClockInfo"), (None, 612.5)),
        (NvmlAtWork(missing="nvmlDeviceGetPowerUsage"), (1980, None)),
        (Nvml(), (None, None)),  # without either
    ],
)
def test_an_nvml_that_does_not_answer_costs_nothing_but_the_answer(nvml, told):
    with sense_nvidia(HERE, nvml) as sense:
        assert sense() == told
    assert nvml.running == 0


def test_without_a_driver_there_is_no_answer_and_no_error(monkeypatch):
    monkeypatch.setattr(driver, "_library", lambda: None)
    with sense_nvidia(HERE) as sense:
        assert sense() == (None, None)


def test_what_goes_wrong_while_it_is_read_is_not_swallowed_and_ends_nvml():
    nvml = NvmlAtWork()
    with pytest.raises(AttributeError, match="a kernel's"), sense_nvidia(HERE, nvml):
        raise AttributeError("a kernel's own mistake")
    assert nvml.running == 0


@pytest.mark.parametrize("power", ["power1_average", "power1_input"])
def test_the_amd_driver_tells_them_in_sys(tmp_path, power):
    gpu = tmp_path / "bus" / "pci" / "devices" / "0000:03:00.0" / "hwmon" / "hwmon4"
    gpu.mkdir(parents=True)
    address = Address("", "0000:03:00.0")
    assert sense_amd(address, tmp_path) == (None, None)
    (gpu / "freq1_input").write_text("2482000000\n")
    assert sense_amd(address, tmp_path) == (2482, None)
    (gpu / power).write_text("303500000\n")
    assert sense_amd(address, tmp_path) == (2482, 303.5)
    assert sense_amd(Address("", "0000:04:00.0"), tmp_path) == sense_amd(Address(), tmp_path) == (None, None)


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_the_driver_is_asked_for_the_gpu_that_torch_means(monkeypatch, hip):
    gpu = SimpleNamespace(uuid=UUID, pci_domain_id=0, pci_bus_id=1, pci_device_id=0)
    nvml, asked = NvmlAtWork(), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(str(device)) or gpu)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(driver, "_library", lambda: pytest.fail("not NVIDIA's") if hip else nvml)
    monkeypatch.setattr("comfyui_attune.measure.bench_machine.sense_amd", lambda address: (address.pci, None))
    with sensing(torch.device("cuda:1")) as sense:
        assert sense() == (("0000:01:00.0", None) if hip else (1980, 612.5))
    assert asked == ["cuda:1"] and gpu_address(gpu) == Address(UUID, "0000:01:00.0")


def test_each_row_has_them_and_the_driver_is_left_when_all_is_done(monkeypatch):
    nvml = NvmlAtWork()

    def slower(*tensors, **options):
        nvml.clocks[SM_CLOCK] = 1500
        return right(*tensors, **options)

    monkeypatch.setattr(module, "sensing", lambda _device: sense_nvidia(HERE, nvml))
    result = bench(kernel("first", right), kernel("second", slower))
    assert [(row["clock_mhz"], row["power_w"]) for row in result["rows"]] == [(1980, 612.5), (1500, 612.5)]
    assert nvml.running == 0 and nvml.calls == ["init"]
    assert "\nThe GPU at work: 1500 to 1980 MHz, 612 W\n" in table(result)
    monkeypatch.undo()
    assert "The GPU at work" not in table(bench(kernel("on the CPU", right)))


@pytest.mark.gpu
def test_this_gpu_tells_its_clock_and_its_power_while_it_works():
    """Power is None on GPUs whose driver does not tell it; a clock all of them have, where they are no part of one."""
    machine = read_machine()
    sdpa = next(one for one in KERNELS if one.name == "sdpa")
    case = Case(Shape("long", 1, 24, 16_384, 16_384, 128), torch.float16)
    (row,) = run_bench(Bench([sdpa], machine, "cuda:0", [case], {"sdpa": ""}, Effort(budget=1.0)))["rows"]
    assert row["status"] == "measured", row
    assert 100 < row["clock_mhz"] < 10_000
    assert row["power_w"] is None or 5 < row["power_w"] < 3000
