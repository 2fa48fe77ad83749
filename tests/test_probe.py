"""The kernel probe: real child processes against stand-ins and packages that go wrong, on a pretended GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import standins
import torch

from comfyui_attune.attention.machine import CPU, Architecture, Device, Machine, nvidia_architecture
from comfyui_attune.doctor import import_probe
from comfyui_attune.doctor import probe as probing
from comfyui_attune.doctor.kernel_verdict import KernelVerdict
from comfyui_attune.doctor.trials import judge, machine_as_json, machine_from_json, prepare, trials
from comfyui_attune.doctor.verdict import short
from comfyui_attune.kernels import KERNELS
from support.loading import ROOT

BY_NAME = {kernel.name: kernel for kernel in KERNELS}

# A package for each way of going wrong. `right` computes attention on tensors of the order (B, N, H, D).
HELPERS = """
import os, sys
import torch

def right(q, k, v, scale=None, mask=None):
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    scores = (scores - scores.amax(-1, keepdim=True)).exp()
    return (scores @ v / scores.sum(-1, keepdim=True)).transpose(1, 2)

calls = []
"""
PACKAGES = {
    "sageattention": """
        def sageattn_qk_int8_pv_fp16_triton(q, k, v, tensor_layout, sm_scale, **others):
            return right(q, k, v, sm_scale).to(q.dtype) * float("nan")

        def sageattn_qk_int8_pv_fp16_cuda(q, k, v, tensor_layout, sm_scale, **others):
            # Plausible, and wrong: the last key is forgotten.
            few = slice(None, -1)
            return right(q, k[:, few], v[:, few], sm_scale).to(q.dtype)

        def sageattn_qk_int8_pv_fp8_cuda(q, k, v, tensor_layout, sm_scale, **others):
            calls.append(1)
            if len(calls) == 2:
                print("CUDA error: invalid argument", file=sys.stderr, flush=True)
                os._exit(3)
            return right(q, k, v, sm_scale).to(q.dtype)
    """,
    "flash_attn": """
        import subprocess
        from pathlib import Path

        def flash_attn_func(q, k, v, softmax_scale=None):
            other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(os.environ["GRANDCHILD"]).write_text(str(other.pid))
            while True:
                pass
    """,
    "flash_attn_interface": """
        import ctypes

        def flash_attn_func(q, k, v, softmax_scale=None):
            calls.append(1)
            if len(calls) == 2:
                ctypes.string_at(0)
            return right(q, k, v, softmax_scale).to(q.dtype)
    """,
    "xformers.ops.fmha": """
        import time

        def memory_efficient_attention(q, k, v, attn_bias=None, scale=None, op=None):
            held = []
            while True:
                held.append(bytearray(b"x") * (32 << 20))
                time.sleep(0.01)
    """,
    "comfy_kitchen": """
        print('{"outcome": "crashed"}')
        for _ in range(100):
            print("x" * 50_000)
        sys.path.insert(0, "/nowhere")
        torch.nn.functional.scaled_dot_product_attention = torch.softmax = lambda *a, **o: a[0] * 0

        def int8_attention_is_available():
            return True

        def int8_attention(q, k, v, scale=None, attn_mask=None):
            os.write(1, b'{"outcome": "hung"}')
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return right(q, k, v, scale, attn_mask).transpose(1, 2).to(q.dtype)
    """,
}
AT_IMPORT = {
    "sageattention": """
        def sageattn_qk_int8_pv_fp16_triton(q, k, v, **others):
            raise RuntimeError("SM80 kernel is not available")

        def sageattn_qk_int8_pv_fp16_cuda(q, k, v, **others):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def sageattn_qk_int8_pv_fp8_cuda(q, k, v, **others):
            k -= 1
            return q
    """,
    "flash_attn": 'raise RuntimeError("expected the aten::_flash_attention_forward schema")',
    "flash_attn_interface": 'raise ImportError("flash_attn_3.so: undefined symbol: _ZN3c105ErrorC2E")',
    "xformers.ops.fmha": "sys.exit(-1)",
}
AMPLE = Device("cuda:0", "a pretended B200", Architecture.BLACKWELL_DATACENTER, (10, 0), 180 << 30)
HOPPER = Device("cuda:0", "a pretended H100", Architecture.HOPPER, (9, 0), 80 << 30)


def pretended(device: Device = HOPPER, **packages: str) -> Machine:
    return Machine((device, CPU), torch="2.11.0+cu130", cuda="13.0", triton="3.6.0", packages=packages)


EVERYTHING = pretended(
    sageattention="2.2.0", flash_attn="2.8.2", flash_attn_interface="3.0.0", xformers="0.0.35", comfy_kitchen="0.2.40"
)


def write(folder: Path, packages: dict[str, str]) -> Path:
    for name, code in packages.items():
        place = folder
        for part in name.split("."):
            place = place / part
            place.mkdir(exist_ok=True)
            (place / "__init__.py").touch()
        (place / "__init__.py").write_text(HELPERS + textwrap.dedent(code), "utf-8")
    return folder


def chosen(*names: str) -> list[Any]:
    return [BY_NAME[name] for name in names]


def gone(pid: int) -> bool:
    """No such process, or one that nobody has fetched yet."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid):
            return True
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.Error:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def disasters(tmp_path_factory) -> dict[str, KernelVerdict]:
    """What became of one kernel of each kind, all of them in one probe."""
    folder = write(tmp_path_factory.mktemp("broken"), PACKAGES)
    before = {child.pid for child in psutil.Process().children()}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("GRANDCHILD", str(folder / "pid"))
        names = ("flash2", "xformers", "flash3", "sage2_fp16_triton", "sage2_fp16_cuda", "sage2_fp8_cuda")
        kernels = chosen(*names, "kitchen_int8", "sage3")
        told = []
        found = probing.probe(
            kernels,
            EVERYTHING,
            ROOT,
            tensors="cpu",
            patience=6,
            memory=1500 << 20,
            at_once=3,
            told=lambda name, _verdict: told.append(name),
        )
    assert sorted(told) == sorted(found) == sorted(kernel.name for kernel in kernels)
    assert {child.pid for child in psutil.Process().children()} <= before
    assert gone(int((folder / "pid").read_text()))
    return found


def test_nan_is_wrong_numbers(disasters):
    verdict = disasters["sage2_fp16_triton"]
    assert (verdict.outcome, verdict.calls) == ("wrong numbers", 1)
    assert verdict.detail.startswith("NaN or infinity in the output for float16, 257 queries on 257 keys")
    assert verdict.error is None
    json.dumps(verdict.as_json(), allow_nan=False)


def test_plausible_but_wrong_numbers_are_found_by_their_error(disasters):
    verdict = disasters["sage2_fp16_cuda"]
    assert verdict.outcome == "wrong numbers"
    assert verdict.error > verdict.allowed == 0.04
    assert f"relative error {verdict.error:.2g} where 0.04 is allowed" in verdict.detail


def test_an_exit_at_the_second_call_is_a_crash_with_its_last_words(disasters):
    verdict = disasters["sage2_fp8_cuda"]
    assert verdict.outcome == "crashed"
    assert "exit code 3, in call 2: float16" in verdict.detail
    assert "CUDA error: invalid argument" in verdict.raw


def test_a_segfault_at_the_second_call_is_a_crash(disasters):
    verdict = disasters["flash3"]
    assert verdict.outcome == "crashed"
    assert ("0xC0000005" if os.name == "nt" else "signal 11 (SIGSEGV), in call 2") in verdict.detail


def test_a_loop_is_hung_and_everything_it_started_is_ended(disasters):
    verdict = disasters["flash2"]
    assert verdict.outcome == "hung"
    assert "did not come to an end within 6 seconds, in call 1" in verdict.detail


def test_allocating_without_end_is_stopped(disasters):
    verdict = disasters["xformers"]
    assert verdict.outcome == "crashed"
    assert "of memory, over the limit of 1.5, in call 1" in verdict.detail


def test_noise_and_a_monkeypatched_torch_do_not_reach_the_verdict(disasters):
    verdict = disasters["kitchen_int8"]
    assert verdict.outcome == "works", verdict
    assert verdict.raw == "" and verdict.calls > 30


def test_what_the_machine_alone_decides_needs_no_child(disasters):
    assert disasters["sage3"].outcome == "not installed"
    assert "needs sm_120 to sm_121, this GPU is sm_90 (Hopper)" in disasters["sage3"].reasons


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, KernelVerdict]:
    folder = write(tmp_path_factory.mktemp("refusing"), AT_IMPORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        names = ("flash2", "xformers", "flash3", "sage2_fp16_triton", "sage2_fp16_cuda", "sage2_fp8_cuda")
        return probing.probe(chosen(*names), EVERYTHING, ROOT, tensors="cpu", at_once=3)


@pytest.mark.parametrize(
    ("name", "outcome", "detail"),
    [
        ("flash2", "cannot import", "RuntimeError: expected the aten::_flash_attention_forward schema"),
        ("xformers", "cannot import", "SystemExit: -1"),
        ("flash3", "cannot import", "ImportError: flash_attn_3.so: undefined symbol"),
        ("sage2_fp16_triton", "unsupported", "RuntimeError: SM80 kernel is not available (in call 1"),
        ("sage2_fp16_cuda", "crashed", "CUDA error: an illegal memory access was encountered (in call 1"),
        ("sage2_fp8_cuda", "wrong numbers", "it changed its inputs"),
    ],
)
def test_exceptions_keep_their_words(refusals, name, outcome, detail):
    verdict = refusals[name]
    assert verdict.outcome == outcome, verdict
    assert detail in verdict.detail
    assert "Traceback" in verdict.raw or outcome == "wrong numbers"


SHORT = {
    "sageattention": """
        def sageattn_qk_int8_pv_fp16_triton(q, k, v, **others):
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                raise ImportError("the compiled kernel could not be loaded") from error

        def sageattn_qk_int8_pv_fp16_cuda(q, k, v, **others):
            raise RuntimeError("CUDA error: out of memory\\nCUDA kernel errors might be reported asynchronously")

        def sageattn_qk_int8_pv_fp8_cuda(q, k, v, **others):
            raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")  # for good
    """,
    "flash_attn": 'raise OSError(28, "Auf dem Datentr\u00e4ger ist kein Platz")',
    "flash_attn_interface": 'raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")',
    "xformers.ops.fmha": 'raise ImportError("libgomp.so.1: cannot allocate memory in static TLS block")',
}


def test_short_memory_and_a_full_disk_decide_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(write(tmp_path, SHORT)))
    names = ("flash2", "xformers", "flash3", "sage2_fp16_triton", "sage2_fp16_cuda", "sage2_fp8_cuda")
    found = probing.probe(chosen(*names), EVERYTHING, ROOT, tensors="cpu")
    assert {name: verdict.outcome for name, verdict in found.items()} == {
        "flash2": "undecided",
        "flash3": "undecided",
        "sage2_fp16_triton": "undecided",
        "sage2_fp16_cuda": "undecided",
        "sage2_fp8_cuda": "unsupported",
        "xformers": "cannot import",
    }
    assert "CUBLAS_STATUS_ALLOC_FAILED" in found["flash3"].detail


@pytest.mark.parametrize(
    ("said", "is_short"),
    [
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes", True),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("RuntimeError: Triton Error [CUDA]: out of memory", True),
        ("OSError: [WinError 1455] Die Auslagerungsdatei ist zu klein", True),
        ("MemoryError", True),
        ("RuntimeError: CUDA error: no kernel image is available for execution on the device", False),
        ('  File "x.py", line 3, in run\n    raise ValueError("out of memory")\nValueError: no', False),
        ("OSError: [WinError 126] The specified module could not be found", False),
    ],
)
def test_the_words_that_tell_of_short_memory(said, is_short):
    assert short(said) is is_short


def test_little_free_memory_is_no_fault_of_the_kernel(tmp_path, monkeypatch):
    """The limit in force is below the full one, because others hold the memory."""
    monkeypatch.syspath_prepend(str(write(tmp_path, {"xformers.ops.fmha": PACKAGES["xformers.ops.fmha"]})))
    monkeypatch.setattr(import_probe, "LEAST_MEMORY", 1500 << 20)
    monkeypatch.setattr(import_probe.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 30))
    verdict = probing.probe(chosen("xformers"), EVERYTHING, ROOT, tensors="cpu")["xformers"]
    assert (verdict.outcome, verdict.lasting) == ("undecided", False), verdict
    assert "over the limit of 1.5, as little was free, in call 1" in verdict.detail


def test_what_import_passes_over_on_the_search_path_is_no_obstacle(monkeypatch):
    """A pack appended a Path: Python ignores it, and JSON does not know it."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere"), b"/nowhere", ["not even hashable"]])
    assert probing.probe(chosen("split"), Machine(), ROOT)["split"].works
    assert probing.stored(chosen("split"), Machine(), ROOT)[1]


def test_stand_ins_on_a_pretended_gpu_work(monkeypatch):
    monkeypatch.setenv("ATTUNE_STANDIN_SM", "90")
    machine = pretended(sageattention="2.2.0", flash_attn="2.8.2")
    with standins.installed("sage2", "flash2"):
        found = probing.probe(chosen("sage2_fp8_cuda", "flash2"), machine, ROOT, tensors="cpu")
    for name, verdict in found.items():
        assert verdict.works, verdict
        assert 0 < verdict.error < verdict.allowed <= max(BY_NAME[name].tolerance.values())
        assert verdict.milliseconds > 0 and verdict.calls >= 14


def test_stopping_the_probe_leaves_no_process(tmp_path, monkeypatch):
    write(tmp_path, {"flash_attn": PACKAGES["flash_attn"]})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GRANDCHILD", str(tmp_path / "pid"))
    before = {child.pid for child in psutil.Process().children()}

    def hold(_name: str) -> bool:
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        probing.probe(chosen("flash2"), _with_sage_1(), ROOT, tensors="cpu", hold=hold)
    assert {child.pid for child in psutil.Process().children()} <= before
    assert gone(int((tmp_path / "pid").read_text()))


def _tried() -> list[int]:
    """Process ids of the children that prove a kernel now."""
    return [one.pid for one in psutil.Process().children() if str(probing.CHILD) in one.cmdline()]


def test_a_kernel_that_is_held_is_not_tried_and_one_under_way_begins_anew(tmp_path, monkeypatch):
    code = """
        from pathlib import Path
        tries = Path(os.environ["TRIES"])
        tries.write_text(tries.read_text() + "x")
        if len(tries.read_text()) == 1:
            while True:
                pass

        def flash_attn_func(q, k, v, softmax_scale=None):
            return right(q, k, v, softmax_scale).to(q.dtype)
    """
    write(tmp_path, {"flash_attn": code})
    tries, at, seen = tmp_path / "tries", [0.0], []
    tries.write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TRIES", str(tries))

    def hold(name: str) -> bool:
        """From the first try on for two seconds."""
        if not at[0] and tries.read_text():
            at[0] = time.monotonic() + 2
        held = at[0] > time.monotonic()
        if held:
            seen.append(_tried())
        return held

    found = probing.probe(chosen("flash2"), _with_sage_1(), ROOT, tensors="cpu", hold=hold)
    assert found["flash2"].works, found["flash2"]
    assert tries.read_text() == "xx"
    assert not seen[-1], "while it was held nothing ran"


def test_a_child_whose_starter_is_gone_ends_by_itself(tmp_path, monkeypatch):
    write(tmp_path, {"flash_attn": "import time\nPath = __import__('pathlib').Path\n"
                     "Path(os.environ['GRANDCHILD']).write_text(str(os.getpid()))\ntime.sleep(600)"})  # fmt: skip
    monkeypatch.setenv("GRANDCHILD", str(tmp_path / "pid"))
    starter = tmp_path / "starter.py"
    starter.write_text(
        textwrap.dedent(f"""
            import os, sys, threading, time
            from pathlib import Path
            sys.path[:0] = {[str(ROOT / "tests"), str(tmp_path)]!r}
            from support.loading import load_package
            load_package("comfyui_attune", Path({str(ROOT)!r}))
            import test_probe
            from comfyui_attune.doctor import probe
            def end():
                while not Path({str(tmp_path / "pid")!r}).exists():
                    time.sleep(0.1)
                os._exit(0)
            threading.Thread(target=end).start()
            probe.probe(test_probe.chosen("flash2"), test_probe._with_sage_1(), Path({str(ROOT)!r}), tensors="cpu")
        """),
        "utf-8",
    )
    subprocess.run([sys.executable, str(starter)], check=True, timeout=120)
    assert gone(int((tmp_path / "pid").read_text()))


def _with_sage_1() -> Machine:
    return pretended(sageattention="1.0.6", flash_attn="2.8.2")


# What is tried


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_what_a_kernel_claims_is_tried_and_nothing_else(kernel):
    device = dataclasses.replace(HOPPER, capability=(8, 9), architecture=nvidia_architecture((8, 9)))
    tried = trials(kernel, pretended(device), device)
    needs = kernel.needs
    assert {trial.call.dtype for trial in tried} <= needs.dtypes
    assert {torch.float16, torch.bfloat16} <= {trial.call.dtype for trial in tried}
    assert len({trial.call.head_dim for trial in tried}) >= 2
    assert any(trial.call.kind == "cross" for trial in tried)
    assert any(trial.call.q_len % 2 for trial in tried)
    on_cuda_no_mask = kernel.name == "sdpa_flash"
    assert any(trial.call.mask for trial in tried) is (bool(needs.masks) and not on_cuda_no_mask)
    assert any(trial.call.kv_heads < trial.call.heads for trial in tried) is needs.gqa


def test_a_trial_that_the_kernel_gets_right_is_right_and_a_changed_input_is_not():
    kernel = BY_NAME["split"]
    trial = trials(kernel, Machine(), CPU)[0]
    prepared = prepare(kernel, trial, "cpu")
    assert judge(kernel, kernel.load(), prepared) <= kernel.tolerance[trial.call.dtype]

    def doubled(q, k, v, **others):
        return kernel.load()(q, k, v, **others).float()

    assert "returned torch.float32" in judge(kernel, doubled, prepared).detail


def test_a_machine_survives_the_way_to_the_child():
    machine = dataclasses.replace(EVERYTHING, cuda=None)
    assert machine_from_json(json.loads(json.dumps(machine_as_json(machine)))) == machine


# What is kept


@pytest.fixture
def counted(monkeypatch):
    """probe() that tells which kernels it was asked for, and answers at once."""
    asked: list[list[str]] = []
    answer = KernelVerdict("works", error=1e-3, allowed=2e-3, calls=3)

    def fake(kernels, *_arguments, told, **_options):
        asked.append([kernel.name for kernel in kernels])
        for name in asked[-1]:
            told(name, fake.answer)
        return dict.fromkeys(asked[-1], fake.answer)

    fake.answer = answer
    fake.asked = asked
    monkeypatch.setattr(probing, "probe", fake)
    return fake


def test_nothing_is_tried_twice_until_something_changes(counted, tmp_path):
    kernels = chosen("sdpa", "split", "flash4", "sage3")
    machine = pretended(**{"flash_attn.cute": "4.0.0b36"})
    first = probing.examine(kernels, machine, ROOT, tmp_path)
    assert probing.examine(kernels, machine, ROOT, tmp_path) == first
    assert counted.asked == [["sdpa", "split", "flash4"]]
    newer = pretended(**{"flash_attn.cute": "4.0.0b40"})
    probing.examine(kernels, newer, ROOT, tmp_path)
    assert counted.asked[1:] == [["flash4"]]
    other = pretended(dataclasses.replace(HOPPER, title="another GPU"), **{"flash_attn.cute": "4.0.0b40"})
    probing.examine(kernels, other, ROOT, tmp_path)
    probing.examine(kernels, newer, ROOT, tmp_path, again=True)
    assert counted.asked[2:] == [["sdpa", "split", "flash4"]] * 2


@pytest.mark.parametrize(
    ("kernel", "package", "file"),
    [
        ("flash3", "flash_attn_interface", "flash_attn_interface.py"),
        ("flash3", "flash_attn_interface", "flash_attn_3/_C.abi3.so"),
        ("flash4", "flash_attn.cute", "flash_attn/cute/interface.py"),
        ("kitchen_int8", "comfy_kitchen", "comfy_kitchen/backends/cuda/_C.abi3.so"),
    ],
)
def test_a_package_that_was_built_anew_is_tried_anew(counted, tmp_path, monkeypatch, kernel, package, file):
    """The same version, another file."""
    site, home = tmp_path / "site", tmp_path / "home"
    for name in ("flash_attn_interface.py", "flash_attn/__init__.py", "comfy_kitchen/__init__.py", file):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("built = 1\n", "utf-8")
    monkeypatch.syspath_prepend(str(site))
    device = HOPPER if kernel == "flash3" else AMPLE
    machine = pretended(device, **{package: "4.0.0b36" if "cute" in package else "3.0.0"})
    for _ in range(2):
        probing.examine(chosen("sdpa", kernel), machine, ROOT, home)
    (site / file).write_text("built = 'again'\n", "utf-8")
    probing.examine(chosen("sdpa", kernel), machine, ROOT, home)
    assert counted.asked == [["sdpa", kernel], [kernel]]


def test_an_undecided_verdict_is_not_kept(counted, tmp_path):
    counted.answer = KernelVerdict("undecided", "was disturbed")
    for _ in range(2):
        assert probing.examine(chosen("sdpa"), Machine(), ROOT, tmp_path)["sdpa"].outcome == "undecided"
    assert counted.asked == [["sdpa"]] * 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b'{"kind": "attune verdicts", "schema": 1, "state": {"sdpa": {"x": {"outcome": "great"}}}}'],
)
def test_an_unreadable_file_of_verdicts_is_begun_anew(counted, tmp_path, content, caplog):
    (tmp_path / "verdicts.json").write_bytes(content)
    assert probing.examine(chosen("sdpa"), Machine(), ROOT, tmp_path)["sdpa"].works
    assert (tmp_path / "verdicts.json.unreadable").read_bytes() == content
    assert "is begun anew" in caplog.text
    assert probing.examine(chosen("sdpa"), Machine(), ROOT, tmp_path)["sdpa"].works
    assert len(counted.asked) == 1
