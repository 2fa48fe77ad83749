"""What is read of the machine: the driver through a pretended NVML, and how packages were built from their files."""

from __future__ import annotations

import ctypes
import importlib.machinery
import json
import ntpath
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comfyui_attune.attention import driver, machine
from comfyui_attune.attention.builds import PACKAGES, Build, read_build
from comfyui_attune.attention.driver import Address, Said, ask_amd, ask_nvidia, pci_address
from comfyui_attune.attention.machine import CPU, Architecture, Device, Machine, read_machine, with_memory_now
from comfyui_attune.doctor.diagnose import remarks
from comfyui_attune.doctor.look import report
from comfyui_attune.doctor.probe import fingerprint
from comfyui_attune.doctor.report import as_json, head
from comfyui_attune.doctor.trials import machine_as_json, machine_from_json
from comfyui_attune.kernels import KERNELS
from support.loading import ROOT

# The driver

UUID = "6fb8c5b1-3a3c-0ed7-9a5e-7a1f1c4f2a10"
SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_FOUND, INSUFFICIENT_SIZE, UNKNOWN = 0, 1, 2, 6, 7, 999  # nvml.h
Handle = ctypes.c_void_p


class Nvml:
    """NVML as C functions behind real pointers: it answers with the codes of nvml.h, and counts who has started it."""

    def __init__(self, version: bytes = b"580.65.06", start: int = SUCCESS, missing: str = "") -> None:
        self.running, self.calls = 0, []
        self.gpus = {1: (b"GPU-" + UUID.encode(), b"00000000:01:00.0", 20 << 30), 2: (b"MIG-aa-bb", b"", 5 << 30)}
        self.version, self.start = version, start
        self._made = []  # ctypes does not keep them alive
        for name, arguments in {
            "nvmlInit_v2": (),
            "nvmlShutdown": (),
            "nvmlSystemGetDriverVersion": (ctypes.POINTER(ctypes.c_char), ctypes.c_uint),
            "nvmlDeviceGetHandleByUUID": (ctypes.c_char_p, ctypes.POINTER(Handle)),
            "nvmlDeviceGetHandleByPciBusId_v2": (ctypes.c_char_p, ctypes.POINTER(Handle)),
            "nvmlDeviceGetMemoryInfo": (Handle, Handle),
        }.items():
            if name != missing:
                setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(getattr(self, f"_{name}")))

    def _nvmlInit_v2(self) -> int:
        self.calls.append("init")
        self.running += self.start == SUCCESS
        return self.start

    def _nvmlShutdown(self) -> int:
        self.running -= 1
        return SUCCESS if self.running >= 0 else UNINITIALIZED

    def _nvmlSystemGetDriverVersion(self, text, length: int) -> int:
        if not self.running:
            return UNINITIALIZED
        if length <= len(self.version):
            return INSUFFICIENT_SIZE
        ctypes.memmove(text, self.version + b"\0", len(self.version) + 1)
        return SUCCESS

    def _find(self, place: int, wanted: bytes, handle) -> int:
        if not self.running:
            return UNINITIALIZED
        for number, gpu in self.gpus.items():
            if gpu[place] and (gpu[place] == wanted or (place == 1 and gpu[1].endswith(wanted))):
                handle[0] = number
                return SUCCESS
        return NOT_FOUND

    def _nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle) -> int:
        return self._find(0, uuid, handle)

    def _nvmlDeviceGetHandleByPciBusId_v2(self, place: bytes, handle) -> int:
        return self._find(1, place, handle)

    def _nvmlDeviceGetMemoryInfo(self, handle: int, memory: int) -> int:
        if handle not in self.gpus:
            return INVALID_ARGUMENT
        free = self.gpus[handle][2]
        (ctypes.c_ulonglong * 3).from_address(memory)[:] = [24 << 30, free, (24 << 30) - free]
        return SUCCESS


@pytest.mark.parametrize(
    ("address", "free"),
    [
        (Address(UUID), 20 << 30),
        (Address(f"GPU-{UUID}"), 20 << 30),
        (Address("aa-bb"), 5 << 30),  # a part of a GPU
        (Address("", "0000:01:00.0"), 20 << 30),
        (Address("another", "0000:01:00.0"), 20 << 30),
        (Address("another", "0000:02:00.0"), None),
        (Address(), None),
    ],
)
def test_nvml_tells_the_driver_and_what_is_free(address, free):
    nvml = Nvml()
    assert ask_nvidia({"cuda:0": address}, nvml) == Said("580.65.06", {} if free is None else {"cuda:0": free})
    assert nvml.running == 0, "it is shut down again"


@pytest.mark.parametrize(
    "nvml", [Nvml(start=UNKNOWN), Nvml(missing="nvmlInit_v2"), Nvml(missing="nvmlDeviceGetMemoryInfo")]
)
def test_an_nvml_that_does_not_answer_costs_nothing_but_the_answer(nvml):
    assert ask_nvidia({"cuda:0": Address(UUID)}, nvml) == Said()
    assert nvml.running == 0


def test_a_version_that_cannot_be_read_leaves_the_memory():
    assert ask_nvidia({"cuda:0": Address(UUID)}, Nvml(version=b"5" * 200)) == Said("", {"cuda:0": 20 << 30})


def test_without_a_driver_there_is_no_answer_and_no_error(monkeypatch):
    def absent(_name):
        raise OSError("no such library")

    monkeypatch.setattr(driver.ctypes, "CDLL", absent)
    assert ask_nvidia({"cuda:0": Address(UUID)}) == Said()


def test_windows_loads_nvml_only_from_the_folders_of_the_driver(monkeypatch):
    asked = []

    def absent(name):
        asked.append(name)
        raise OSError("no such library")

    monkeypatch.setattr(driver.ctypes, "CDLL", absent)
    monkeypatch.setattr(driver, "os", SimpleNamespace(name="nt", path=ntpath, environ={}))
    assert ask_nvidia({}) == Said()
    assert asked == [r"C:\Windows\System32\nvml.dll", r"C:\Program Files\NVIDIA Corporation\NVSMI\nvml.dll"]


def test_the_amd_driver_is_read_from_sys(tmp_path):
    folder = tmp_path / "bus" / "pci" / "devices" / "0000:03:00.0"
    folder.mkdir(parents=True)
    (folder / "mem_info_vram_total").write_text("25753026560\n")
    (folder / "mem_info_vram_used").write_text("753026560\n")
    gpus = {"cuda:0": Address("", "0000:03:00.0"), "cuda:1": Address("", "0000:04:00.0"), "cuda:2": Address()}
    assert ask_amd(gpus, tmp_path) == Said("", {"cuda:0": 25_000_000_000})
    (tmp_path / "module" / "amdgpu").mkdir(parents=True)
    (tmp_path / "module" / "amdgpu" / "version").write_text("6.12.12\n")
    assert ask_amd({}, tmp_path) == Said("6.12.12", {})
    assert ask_amd(gpus, tmp_path / "absent") == Said()


def test_a_place_on_the_bus():
    assert pci_address((0, 1, 0)) == "0000:01:00.0" and pci_address((1, 0xC1, 0)) == "0001:c1:00.0"
    assert pci_address((0, None, 0)) == ""


# The devices, as torch tells them


def pretend(monkeypatch, properties: dict, hip: str | None = None, said: Said | None = None) -> None:
    """Make torch tell of one GPU, and the driver say `said`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.version, "hip", hip)
    for vendor, asked in (("nvidia", hip is None), ("amd", hip is not None)):
        answer = (lambda _gpus: said or Said()) if asked else (lambda _gpus: pytest.fail("asked the wrong driver"))
        monkeypatch.setattr(machine, f"ask_{vendor}", answer)


NVIDIA = {"name": "NVIDIA RTX PRO 6000", "major": 12, "minor": 0, "total_memory": 96 << 30, "uuid": UUID}
AMD = {"name": "AMD RX 7900 XTX", "major": 11, "minor": 0, "total_memory": 24 << 30, "gcnArchName": "gfx1100:xnack-"}


def test_an_nvidia_gpu_has_a_driver_and_free_memory(monkeypatch):
    pretend(monkeypatch, NVIDIA, said=Said("580.65.06", {"cuda:0": 90 << 30}))
    here = read_machine()
    assert here.driver == "580.65.06"
    assert here.main_device == Device(
        "cuda:0", "NVIDIA RTX PRO 6000", Architecture.BLACKWELL_CONSUMER, (12, 0), 96 << 30, 90 << 30
    )
    assert head(here, here.main_device)[0] == (
        "cuda:0: NVIDIA RTX PRO 6000 (Blackwell (consumer), sm_120), 96.0 GiB, 90.0 free"
    )
    pretend(monkeypatch, NVIDIA, said=Said("580.65.06", {"cuda:0": 10 << 30}))
    assert with_memory_now(here).main_device.free == 10 << 30
    assert here.main_device.free == 90 << 30
    assert read_machine(gpus=False).driver == "" and read_machine(gpus=False).devices == (CPU,)


def test_an_amd_gpu_is_known_by_its_gfx_number(monkeypatch):
    pretend(monkeypatch, AMD, hip="6.4", said=Said("6.12.12"))
    here = read_machine()
    device = here.main_device
    assert (device.architecture, device.capability, device.gfx) == (Architecture.AMD, None, "gfx1100")
    assert head(here, device)[0] == "cuda:0: AMD RX 7900 XTX (AMD, gfx1100), 24.0 GiB"
    assert here.driver == "6.12.12"


def test_the_driver_is_part_of_a_verdicts_key_for_a_gpu_and_not_for_the_cpu():
    gpu = Device("cuda:0", "a GPU", Architecture.ADA, (8, 9), 24 << 30)
    kernel = KERNELS[0]

    def key(device: Device, driver: str) -> str:
        return fingerprint(kernel, Machine((device, CPU), driver=driver), device, "around", [])

    assert key(gpu, "570.1") != key(gpu, "580.2")
    assert key(CPU, "570.1") == key(CPU, "580.2")
    assert key(gpu, "570.1") == key(Device(**{**vars_of(gpu), "free": 1 << 30}), "570.1")


def vars_of(device: Device) -> dict:
    return {name: getattr(device, name) for name in device.__slots__}


def test_the_doctor_says_when_a_driver_is_there_and_torch_sees_no_gpu():
    (said,) = remarks(Machine(torch="2.11.0+cpu", driver="580.65"))
    assert "built without CUDA" in said and "As NVIDIA's driver 580.65 is here" in said
    (said,) = remarks(Machine(torch="2.11.0+cu130", cuda="13.0", driver="470.1"))
    assert "driver 470.1 is here" in said and "too old for CUDA 13.0" in said
    (said,) = remarks(Machine(torch="2.11.0+cpu"))
    assert "If this machine has an NVIDIA GPU" in said
    assert remarks(Machine((Device("cuda:0", "", Architecture.ADA), CPU), driver="1")) == []


# Packages

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
OTHER_PYTHON = ".cpython-27-x86_64-linux-gnu.so"


def install(folder: Path, distribution: str, version: str, files: dict[str, str], **metadata: str) -> None:
    """A package as an installer leaves it; what its files hold would fail if it were run."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    info = folder / f"{distribution}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", "utf-8")
    for name, text in metadata.items():
        (info / name.replace("__", ".")).write_text(text, "utf-8")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages, in which ours are found before any other."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in PACKAGES:
        monkeypatch.delitem(sys.modules, name.partition(".")[0], raising=False)
    return tmp_path


WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp39-abi3-win_amd64\n"
SAGE = """
import os
from .core import sageattn, sageattn_varlen
from .core import sageattn_qk_int8_pv_fp16_cuda as renamed
try:
    from .quant import per_block_int8, _hidden
except ImportError:
    pass
def own(): ...
raise RuntimeError("this package was run")
"""


def test_sageattention_tells_what_it_was_built_for_and_what_is_in_it(site):
    files = {
        "sageattention/__init__.py": SAGE, "sageattention/core.py": "1 / 0", "sageattention/_private.py": "",
        f"sageattention/_qattn_sm80{SUFFIX}": "", f"sageattention/_fused{SUFFIX}": "",
        f"sageattention/_qattn_sm90{OTHER_PYTHON}": "", f"sageattention/triton/part{SUFFIX}": "",
        "sageattention/triton/__init__.py": "",
    }  # fmt: skip
    install(site, "sageattention", "2.2.0+cu130torch2.9.0andhigher.post4", files, WHEEL=WHEEL)
    build = read_build("sageattention")
    assert build.built == ("CUDA 13.0", "PyTorch 2.9.0 or newer") and build.wheel == "cp39-abi3-win_amd64"
    assert build.modules == ("_fused", "_qattn_sm80", "_qattn_sm90 (of another Python)", "triton.part")
    assert build.names == ("sageattn", "sageattn_varlen", "renamed", "per_block_int8", "own", "core", "triton")
    here = read_machine(gpus=False)
    assert here.packages["sageattention"] == "2.2.0+cu130torch2.9.0andhigher.post4"
    assert here.builds["sageattention"] == build
    (line,) = [line for line in head(here, CPU) if line.startswith("  sageattention ")]
    assert "built for CUDA 13.0, PyTorch 2.9.0 or newer, cp39-abi3-win_amd64" in line
    assert "compiled: _fused, _qattn_sm80" in line and "offers sageattn, sageattn_varlen" in line
    assert "sageattention" not in sys.modules


def test_xformers_tells_what_it_was_built_with(site):
    built = {"version": {"cuda": 1208, "hip": None, "torch": "2.8.0+cu128", "python": "3.12.11"}, "env": {}}
    files = {"xformers/__init__.py": "", f"xformers/_C{SUFFIX}": "", "xformers/cpp_lib.json": json.dumps(built)}
    install(site, "xformers", "0.0.32.post2", {**files, "xformers/ops/__init__.py": ""})
    assert read_build("xformers") == Build(("CUDA 12.8", "PyTorch 2.8.0+cu128"), "", ("_C",), ("ops",))
    (site / "xformers" / "cpp_lib.json").write_text("{broken")
    assert read_build("xformers").built == ()


def test_flash_attention_tells_it_by_where_it_came_from(site):
    wheel = "flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"
    origin = json.dumps({"url": f"https://user:secret@example.org/v2.8.3/{wheel}", "archive_info": {}})
    files = {
        "flash_attn/__init__.py": "from flash_attn.flash_attn_interface import flash_attn_func\nimport os.path",
        f"flash_attn_2_cuda{SUFFIX}": "", f"another{SUFFIX}": "",
    }  # fmt: skip
    install(site, "flash_attn", "2.8.3", files, direct_url__json=origin)
    build = read_build("flash_attn")
    assert build.built == ("CUDA 12", "PyTorch 2.8", "C++11 ABI")
    assert build.modules == ("flash_attn_2_cuda",) and build.names == ("flash_attn_func",)


@pytest.mark.parametrize(
    ("version", "built"),
    [
        ("1.0.0+cu128torch271", ("CUDA 12.8", "PyTorch 2.7.1")),
        ("1.0.0+cu128torch2100", ("CUDA 12.8", "PyTorch 2.10.0")),
        ("2.8.3+cu130torch2.10cxx11abiFALSE", ("CUDA 13.0", "PyTorch 2.10", "old C++ ABI")),
        ("2.8.3+rocm6.4", ("ROCm 6.4",)),
        ("2.8.3+cpu", ()),
        ("2.8.3", ()),
    ],
)
def test_a_local_version_is_understood(site, version, built):
    install(site, "sageattn3", version, {"sageattn3/__init__.py": ""})
    assert read_build("sageattn3").built == built


@pytest.mark.parametrize(
    ("origin", "built"),
    [
        (
            {"url": "https://user:s3cret@github.com/thu-ml/SageAttention.git",
             "vcs_info": {"vcs": "git", "commit_id": "1234567890abcdef"}},
            "from github.com/thu-ml/SageAttention at 1234567890",
        ),
        ({"url": "file:///home/alice/SageAttention", "dir_info": {"editable": True}}, "from a local folder, editable"),
        ({"url": "file:///home/alice/SageAttention", "dir_info": {}}, "from a local folder"),
    ],
)  # fmt: skip
def test_where_a_package_came_from_is_told_without_names_and_secrets(site, origin, built):
    install(site, "sageattn3", "1.0.0", {"sageattn3/__init__.py": ""}, direct_url__json=json.dumps(origin))
    assert read_build("sageattn3").built == (built,)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}', '{"vcs_info": {}}', "null"])
def test_metadata_that_cannot_be_read_is_left_out(site, text):
    install(site, "sageattn3", "1.0.0", {"sageattn3/__init__.py": "def broken(:"}, direct_url__json=text, WHEEL=text)
    assert read_build("sageattn3") == Build()


def test_a_package_without_metadata_is_one_without_a_version(site):
    (site / "flash_attn_interface.py").write_text("def flash_attn_func(): ...\n1 / 0")
    (site / "flash_attn_3").mkdir()
    (site / "flash_attn_3" / f"_C{SUFFIX}").write_text("")
    assert read_machine(gpus=False).packages["flash_attn_interface"] == ""
    build = read_build("flash_attn_interface")
    assert build.modules == ("flash_attn_3._C",) and build.names == ("flash_attn_func",)


# The whole


def test_reading_this_machine_imports_no_package_and_starts_no_gpu():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from support import loading\n"
        "loading.load_package('comfyui_attune', loading.ROOT)\n"
        "from comfyui_attune.attention.machine import PACKAGES, read_machine\n"
        "before = set(sys.modules)\n"
        "import torch; here = read_machine(gpus=False)\n"
        "print(sorted(set(sys.modules) & set(PACKAGES)), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.stdout.split() == ["[]", "False"], done.stdout + done.stderr


def test_a_machine_survives_the_way_to_a_child_process(site):
    install(site, "sageattention", "2.2.0+cu128torch2.8.0", {"sageattention/__init__.py": SAGE}, WHEEL=WHEEL)
    gpu = Device("cuda:0", "Größe", Architecture.AMD, None, 24 << 30, 20 << 30, "gfx1100")
    found = read_machine(gpus=False)
    here = Machine((gpu, CPU), packages=found.packages, builds=found.builds, driver="6.12")
    assert here.builds["sageattention"].built
    assert machine_from_json(json.loads(json.dumps(machine_as_json(here)))) == here


def test_the_start_up_block_shows_the_driver_free_memory_and_builds(comfy):
    from comfyui_attune.host.default import summary

    gpu = Device("cuda:0", "RTX 5090", Architecture.BLACKWELL_CONSUMER, (12, 0), 32 << 30, 29 << 30)
    builds = {
        "xformers": Build(("CUDA 12.8", "PyTorch 2.8.0+cu128"), "cp39-abi3-win_amd64", ("_C",), ("ops",)),
        "sageattention": Build(("CUDA 12.8",), "", ("_fused", "_qattn_sm80", "_qattn_sm89"), ("sageattn",)),
    }
    packages = {"xformers": "0.0.32.post2", "sageattention": "2.2.0+cu128torch2.8.0", "flash_attn": "2.8.3"}
    here = Machine(
        (gpu, CPU),
        torch="2.8.0",
        cuda="12.8",
        packages=packages,
        builds=builds,
        driver="580.65",
        host_attention="pytorch",
    )
    lines = summary(here, "sage")
    assert lines[:2] == [
        "GPU Configuration Summary",
        "  cuda:0: RTX 5090 (Blackwell (consumer), sm_120), 32.0 GiB, 29.0 free",
    ]
    assert lines[3] == "  torch 2.8.0, CUDA 12.8, driver 580.65, Triton none, Python 3.11, Linux"
    assert lines[4] == (
        "  attention packages: xformers 0.0.32.post2 (CUDA 12.8, PyTorch 2.8.0+cu128), "
        "sageattention 2.2.0+cu128torch2.8.0 (_qattn_sm80, _qattn_sm89), flash_attn 2.8.3"
    )
    assert lines[5].startswith("  Selected Mechanism: host (ComfyUI's own, pytorch; ") and len(lines) == 6


def test_the_report_as_data_has_the_driver_the_memory_and_the_builds(tmp_path):
    gpu = Device("cuda:0", "a GPU", Architecture.ADA, (8, 9), 24 << 30, 20 << 30)
    here = Machine(
        (gpu, CPU), driver="580.65", packages={"xformers": "0.0.35"}, builds={"xformers": Build(("CUDA 12.8",))}
    )
    data = json.loads(json.dumps(as_json(report(KERNELS, {}, here, ROOT, tmp_path))))["machine"]
    assert (data["driver"], data["devices"][0]["free"]) == ("580.65", 20 << 30)
    assert data["builds"]["xformers"]["built"] == ["CUDA 12.8"]
