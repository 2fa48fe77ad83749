"""The doctor: causes and cures from hand-made machines and verdicts, the report, and the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from comfyui_attune.attention import guard
from comfyui_attune.attention.kernel import machine_reasons
from comfyui_attune.attention.machine import (
    CPU,
    Architecture,
    Device,
    Machine,
    first_choices,
    nvidia_architecture,
    read_machine,
)
from comfyui_attune.doctor.cures import Cure, Place
from comfyui_attune.doctor.diagnose import Diagnosis, diagnose, diagnose_one, outlook
from comfyui_attune.doctor.facts import CAUSES
from comfyui_attune.doctor.hub import OFFERS
from comfyui_attune.doctor.kernel_verdict import KernelVerdict
from comfyui_attune.doctor.look import report as look
from comfyui_attune.doctor.prebuilt import PREBUILT
from comfyui_attune.doctor.probe import without_trying
from comfyui_attune.doctor.quarantine import store as quarantine
from comfyui_attune.doctor.report import Report, as_json, as_text, scrub
from comfyui_attune.doctor.speeds import PUBLISHED
from comfyui_attune.host.remembered import remember
from comfyui_attune.kernels import KERNELS
from support.loading import ROOT

BY_NAME = {kernel.name: kernel for kernel in KERNELS}
WORKS = KernelVerdict("works", error=1e-3, allowed=2e-3, milliseconds=0.5, timed="4096 tokens", calls=20)
LINUX = Place("/opt/comfy/python", "x86_64")
WINDOWS = Place(r"C:\Program Files\ComfyUI\python.exe", "AMD64")


def gpu(sm: int, title: str = "a pretended GPU") -> Device:
    capability = divmod(sm, 10)
    return Device("cuda:0", title, nvidia_architecture(capability), capability, 24 << 30)


def machine(sm: int, **changes: Any) -> Machine:
    values = {"torch": "2.8.0+cu128", "cuda": "12.8", "triton": "3.4.0", "python": "3.12.7", **changes}
    return Machine((gpu(sm), CPU), **values)


def diagnosed(here: Machine, found: dict[str, KernelVerdict] | None = None, place: Place = LINUX) -> list[Diagnosis]:
    """Everything that this machine does not rule out works, but for what `found` says."""
    verdicts = {
        kernel.name: (found or {}).get(kernel.name) or without_trying(kernel, here, here.main_device) or WORKS
        for kernel in KERNELS
    }
    return diagnose(KERNELS, verdicts, here, place)


def one(name: str, here: Machine, verdict: KernelVerdict | None = None, place: Place = LINUX) -> Diagnosis:
    verdict = verdict or without_trying(BY_NAME[name], here, here.main_device)
    assert verdict is not None
    return diagnose_one(BY_NAME[name], verdict, here, place)


# Causes

SCHEMA = (
    "RuntimeError: Current Torch with Flash-Attention 2.5.7 doesn't have a compatible "
    "aten::_flash_attention_forward schema\nEXPECTED … rng_state, unused but GOT … philox_seed, philox_offset"
)
ERRORS = [
    ("flash_schema", "xformers", SCHEMA),
    ("xformers_flash_range", "xformers", "Requires Flash-Attention version >=2.7.1,<=2.8.2 but got 2.8.3"),
    ("no_kernel_image", "sage2_fp8_cuda", "CUDA error: no kernel image is available for execution on the device"),
    ("xformers_hopper", "xformers", "CUDA error (/xformers/hopper/flash_fwd_launch_template.h:180): invalid argument"),
    ("ampere_only", "flash2", "RuntimeError: FlashAttention only supports Ampere GPUs or newer."),
    ("sage_arch", "sage2_fp8_cuda", "ValueError: Unsupported CUDA architecture: sm100"),
    ("other_torch", "flash2", "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS"),
    ("other_torch", "flash2", "[WinError 127] DLL load failed while importing flash_attn_2_cuda: a procedure …"),
    ("missing_library", "flash2", "ImportError: libcudart.so.11.0: cannot open shared object file: No such file"),
    ("missing_library", "sage3", "OSError: DLL load failed while importing fp4attn_cuda"),
    ("glibc", "flash2", "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.32' not found (required by …)"),
    ("compiled_part", "sage3", "ModuleNotFoundError: No module named 'fp4attn_cuda'"),
    ("numpy_1", "xformers", "A module that was compiled using NumPy 1.x cannot be run in NumPy 2.1.0"),
    ("old_driver", "flash2", "CUDA driver version is insufficient for CUDA runtime version"),
    ("python_headers", "sage1", "main.c:5:10: fatal error: Python.h: No such file or directory"),
    ("c_compiler", "sage1", "RuntimeError: Failed to find C compiler. Please specify via CC environment variable"),
    ("old_ptxas", "sage1", "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"),
    ("triton_cache", "sage1", "PermissionError: [Errno 13] Permission denied: '/home/u/.triton/cache/ABC'"),
    ("other_triton", "sage1", "ImportError: cannot import name 'triton_key' from 'triton.compiler.compiler'"),
    ("cudnn_plans", "sdpa_cudnn", "RuntimeError: cuDNN Frontend error: [cudnn_frontend] no valid execution plans"),
    ("illegal_access", "xformers", "CUDA error: an illegal memory access was encountered"),
]


@pytest.mark.parametrize(("cause", "name", "words"), ERRORS, ids=lambda value: str(value)[:20])
def test_a_known_error_is_explained_with_a_source_and_its_own_words_are_kept(cause, name, words):
    fact = next(fact for fact in CAUSES if fact.name == cause)
    here = machine(120 if name == "sage3" else 89, packages={BY_NAME[name].package: ""})
    found = one(name, here, KernelVerdict("cannot import", words.partition("\n")[0], words))
    assert fact.text in found.cause
    assert found.cause_source == fact.source
    report = Report(here, here.main_device, [found])
    assert words.splitlines()[-1] in as_text(report)
    assert as_json(report)["kernels"][0]["verdict"]["raw"] == words


def test_every_known_cause_has_a_source_and_an_example():
    assert all(cause.source and cause.text for cause in CAUSES)
    assert {cause.name for cause in CAUSES} == {name for name, _, _ in ERRORS}


@pytest.mark.parametrize("outcome", ["cannot import", "unsupported", "crashed", "hung"])
def test_an_unknown_error_is_called_unknown_and_gets_no_cure(outcome):
    here = machine(89, packages={"flash_attn": "2.8.3"})
    found = one("flash2", here, KernelVerdict(outcome, "ZebraError: stripes", "ZebraError: stripes are wet"))
    assert "not known to the doctor" in found.cause
    assert found.cure is None
    assert "stripes are wet" in as_text(Report(here, here.main_device, [found]))


def test_wrong_numbers_say_what_they_would_do_and_guess_nothing():
    here = machine(86, packages={"sageattention": "2.2.0"})
    found = one("sage2_fp16_cuda", here, KernelVerdict("wrong numbers", "relative error 0.5 where 0.04 is allowed"))
    assert found.cause.endswith("Why is not known.") and found.cure is None
    assert "relative error 0.5 where 0.04 is allowed" in as_text(Report(here, here.main_device, [found]))


# Cures


@pytest.mark.parametrize(
    ("name", "sm", "changes", "place", "command"),
    [
        ("xformers", 89, {}, LINUX, "--no-deps xformers==0.0.32.post2 --index-url https://download.pytorch.org/whl/cu128"),
        ("xformers", 89, {"torch": "2.9.1+cu130", "cuda": "13.0"}, LINUX, "xformers==0.0.33.post2 --index-url"),
        ("xformers", 120, {}, LINUX, ""),  # its kernels for Hopper would end the process
        ("xformers", 120, {"torch": "2.10.0", "cuda": "12.8"}, LINUX, "xformers==0.0.35"),
        ("xformers", 89, {"torch": "2.12.0", "cuda": "13.0"}, LINUX, ""),
        ("xformers", 89, {"torch": "2.8.0", "cuda": "11.8"}, LINUX, ""),
        ("xformers", 89, {}, Place("python", "aarch64"), ""),
        ("flash2", 89, {}, LINUX, "flash-attn==2.8.3 --no-build-isolation"),
        ("flash2", 89, {"torch": "2.9.0"}, LINUX, ""),
        ("flash2", 89, {"python": "3.14.0"}, LINUX, ""),
        ("flash2", 89, {"system": "Windows"}, WINDOWS, ""),
        ("flash3", 90, {}, LINUX, ""),
        ("flash3", 90, {"torch": "2.10.0+cu130", "cuda": "13.0"}, LINUX, "flash-attn-3 --index-url"),
        ("flash4", 100, {}, LINUX, "--pre flash-attn-4"),
        ("sage1", 86, {}, LINUX, "sageattention==1.0.6"),
        ("sage2_fp8_cuda", 89, {}, LINUX, ""),
        ("sage2_fp8_cuda", 89, {"system": "Windows"}, WINDOWS, ""),
        (
            "sage2_fp8_cuda",
            120,
            {"system": "Windows", "torch": "2.9.1+cu130", "cuda": "13.0"},
            WINDOWS,
            "sageattention-2.2.0%2Bcu130torch2.9.0andhigher.post4-cp39-abi3-win_amd64.whl",
        ),
        ("sage3", 120, {}, LINUX, ""),
        ("kitchen_int8", 75, {}, LINUX, "comfy-kitchen>=0.2.40"),
    ],
)  # fmt: skip
def test_a_cure_is_a_command_for_this_machine_or_says_that_none_is_known(name, sm, changes, place, command):
    found = one(name, machine(sm, **changes), place=place)
    assert found.verdict.outcome == "not installed" and not found.helpless
    python = f'"{place.python}"' if " " in place.python else place.python
    if command:
        assert found.cure.command.startswith(f"{python} -m pip install ")
        assert command in found.cure.command
        assert found.cure.source
    else:
        hub = f"{python} ComfyUI-Attune get {name}" if name in OFFERS else ""
        assert found.cure.command == hub
        here = machine(sm, **changes)
        python = ".".join(here.python.split(".")[:2])
        told = f"No prebuilt of it is known for Python {python}, {here.system} {place.cpu}, PyTorch {here.torch}"
        assert found.cure.text.startswith(told)


def test_what_is_proposed_is_what_the_kernels_themselves_would_accept():
    for build in PREBUILT:
        assert build.source
        takers = [kernel for kernel in KERNELS if kernel.package == build.package]
        accepted = [
            kernel.name
            for kernel in takers
            for sm in (75, 80, 86, 89, 90, 100, 120)
            if not machine_reasons(kernel, machine(sm, packages={build.package: build.version}))
        ]
        assert accepted or build.package == "triton", build


def test_sage_2_over_sage_1_is_a_matter_of_installing():
    found = one("sage2_fp8_cuda", machine(89, packages={"sageattention": "1.0.6"}))
    assert (found.verdict.outcome, found.helpless) == ("unsupported", False)
    assert "SageAttention 1 has none of these functions" in found.cause
    assert found.cure.command.endswith(" get sage2_fp8_cuda")
    pp = one("sage2_fp8_cuda_pp", machine(89, packages={"sageattention": "1.0.6"}))
    assert pp.cure.command == "" and "build SageAttention 2 from github.com/thu-ml/SageAttention" in pp.cure.text


def test_nobody_is_told_to_go_back_to_an_older_version():
    found = one("sage1", machine(89, packages={"sageattention": "2.2.0"}))
    assert found.cure == Cure("Nothing has to be done: a newer version is there.")


def test_without_triton_the_cure_is_triton():
    packages = {"sageattention": "2.2.0"}
    linux = one("sage2_fp8_cuda", machine(89, packages=packages, triton=None))
    assert linux.cure.command == '/opt/comfy/python -m pip install "triton==3.4.*"'
    here = machine(89, packages=packages, triton=None, system="Windows")
    windows = one("sage2_fp8_cuda", here, place=WINDOWS)
    assert windows.cure.command.endswith('-m pip install "triton-windows<3.5"')


def test_a_broken_build_is_replaced_and_torch_is_left_alone():
    here = machine(89, packages={"flash_attn": "2.8.3"})
    found = one("flash2", here, KernelVerdict("cannot import", "ImportError: x.so: undefined symbol: y"))
    assert "--force-reinstall --no-deps flash-attn==2.8.3 --no-build-isolation" in found.cure.command


def test_no_installation_is_proposed_where_the_gpu_decides():
    for name, sm in (("flash3", 89), ("sage3", 90), ("sage2_fp8_cuda", 86), ("flash2", 75), ("flash3", 120)):
        found = one(name, machine(sm))
        assert found.helpless and found.cure.command == "" and "sm_" in found.cause
    assert all(
        one.helpless or one.verdict.works for one in diagnosed(Machine(torch="2.11.0+cpu")) if one.kernel.package != ""
    )


def test_building_sage_3_on_windows_comes_with_the_warning_that_belongs_to_it():
    here = machine(120, system="Windows", packages={"sageattn3": "1.0.0"})
    found = one("sage3", here, KernelVerdict("cannot import", "No module named 'fp4attn_cuda'"), WINDOWS)
    assert "C2872" in found.cure.text
    assert "long sequences" in found.advice and "20 or more" in found.advice


# What would be best


@pytest.mark.parametrize(
    ("sm", "packages", "exact", "fast", "gain"),
    [
        (90, {}, "flash3 (not installed); until then sdpa_cudnn.", "sage2_fp8_cuda (not installed); until then",
         "against sdpa_cudnn with 600 TFLOPS or TOPS: sage2_fp8_cuda 900 (1.5 times), sage1 516 (0.86 times: slower), "
         "flash3 459 (0.77 times: slower)"),
        (89, {}, "flash2 (not installed); until then sdpa.", "sage2_fp8_cuda_pp (not installed); until then sdpa.",
         "against sdpa with 164 TFLOPS or TOPS: sage2_fp8_cuda_pp 490 (3.0 times), sage2_fp8_cuda 423 (2.6 times), "
         "sage1 317 (1.9 times), flash2 164 (no gain), xformers 105 (0.64 times: slower)"),
        (89, {"flash_attn": "2.8.2", "sageattention": "2.2.0"}, "flash2, which works.", "cuda_pp, which works.",
         "Published for an RTX 4090 (sm_89), 8K tokens"),
        (120, {}, "flash2 (not installed)", "sage2_fp8_cuda_pp (not installed)", "sage3 1038 (4.9 times), sage2_fp8"),
        (100, {}, "flash4 (not installed); until then sdpa.", "flash4", "No published speeds are known for sm_100."),
        (75, {}, "xformers (not installed); until then sdpa.", "kitchen_int8", "speeds are known for sm_75."),
        (61, {}, "sdpa, which works.", "sdpa, which works.", ""),
    ],
)  # fmt: skip
def test_the_outlook_names_the_best_kernel_and_the_published_gain(sm, packages, exact, fast, gain):
    here = machine(sm, packages=packages)
    said = outlook(diagnosed(here), here)
    assert exact in said[0] and fast in said[1]
    assert gain in " ".join(said[2:])
    assert ("arXiv" in said[-1]) is (sm in (89, 90, 120))


def test_the_published_speeds_are_those_of_the_page():
    page = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    for published in PUBLISHED:
        row = next(line for line in page.splitlines() if line.startswith(f"| {published.gpu.split(' ', 1)[1]} |"))
        for name, speeds in published.speeds.items():
            assert "/".join(map(str, speeds)) in row, (published.gpu, name)


def test_every_kernel_that_a_choice_names_is_one_that_the_doctor_knows():
    names = {name for architecture in Architecture for fast in (0, 1) for name in first_choices(architecture, fast)}
    assert names <= set(BY_NAME)


# The report


def test_a_report_keeps_the_verdicts_apart_and_names_shared_causes_once():
    here = machine(89, packages={"sageattention": "2.2.0"})
    broken = KernelVerdict(
        "cannot import", "ImportError: x.so: undefined symbol: y", "Traceback …\nundefined symbol: y"
    )
    names = ("sage2_fp16_triton", "sage2_fp16_cuda", "sage2_fp8_cuda", "sage2_fp8_cuda_pp")
    text = as_text(Report(here, here.main_device, diagnosed(here, dict.fromkeys(names, broken))))
    assert f"{', '.join(names)}: cannot import\n" in text
    assert text.count("Traceback …") == 1
    assert "sdpa                  exact  works          error 0.001 (0.002 allowed), 0.50 ms (4096 tokens)" in text


def test_a_package_in_quarantine_is_to_be_let_in_not_to_be_installed(tmp_path):
    here = machine(89)  # inside ComfyUI it looks as if it were not installed
    quarantine(tmp_path).update(lambda state: state.added.append("sageattention"))
    verdicts = {kernel.name: without_trying(kernel, here, here.main_device) or WORKS for kernel in KERNELS}
    found = look(KERNELS, verdicts, here, ROOT, tmp_path)
    for one in found.diagnoses:
        let_in = one.cure is not None and one.cure.command == "attune quarantine remove sageattention"
        assert let_in is (one.kernel.package == "sageattention" and not one.helpless), one.kernel.name
    text = as_text(found)
    assert text.count("ComfyUI does not get to see sageattention: in quarantine on request") >= 2
    assert "pip install sageattention" not in text


def test_a_kernel_without_a_verdict_has_not_been_tried_yet(tmp_path):
    found = look(KERNELS, {}, machine(89), ROOT, tmp_path)
    assert {one.verdict.outcome for one in found.diagnoses} == {"undecided"}
    assert "has not been tried yet" in as_text(found) and "still to come" in as_text(found)
    assert "Best exact on this device: none of flash2, xformers, sdpa works here." in found.outlook


SECRETS = [
    ("/home/alice/ComfyUI/x.py", "<home>/ComfyUI/x.py"),
    (r"C:\Users\Alice\AppData\x.py", r"<home>\AppData\x.py"),
    ("c:\\\\users\\\\alice\\\\x", "<home>\\\\x"),
    ("/Users/bob/x", "<home>/x"),
    ("/data/alice_models/a.safetensors on alice-pc", "/data/<name>_models/a.safetensors on <name>"),
    ("HF_TOKEN=hf_abcdefghijklmnop done", "<removed> done"),
    ("using hf_abcdefghijklmnop now", "using <removed> now"),
    ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer <removed>"),
    ("https://alice:s3cret@example.org/simple", "https://<removed>@example.org/simple"),
    ('{"api_key": "abc123"}', '{"<removed>"}'),
    ("mail alice@example.org", "mail <address>"),
    ("/srv/people/alice/x and /srv/people/alicent", "<home>/x and /srv/people/alicent"),
    ("/mnt/c/srv/people/alice/x", "/mnt/c/srv/people/<name>/x"),
    (r"C:\Users\Bob van Dam\ComfyUI\x.py is there", r"<home>\ComfyUI\x.py is there"),
    (r"C:\Users\bob or D:\x", r"<home> or D:\x"),
    (r"in '\\nas\bob\models\x'", r"in '<share>\models\x'"),
    (r"\\nas.corp\home\bob\x and \\?\UNC\nas\bob\x", r"<share><home>\x and <share>\x"),
    (r"\\?\C:\Users\bob\x", r"\\?\<home>\x"),
    ("c:\\\\models (new)\\\\alice\\\\x", "c:\\\\models (new)\\\\<name>\\\\x"),
    ("malice and flash_attn 2.8.3+cu128 in /usr/lib/python3", "malice and flash_attn 2.8.3+cu128 in /usr/lib/python3"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), SECRETS)
def test_a_bundle_says_nothing_about_its_user(text, wanted):
    assert scrub(text, ["/srv/people/alice"], ["alice-pc", "alice"]) == wanted
    assert scrub({"a": [text, 1, None]}, ["/srv/people/alice"], ["alice-pc", "alice"]) == {"a": [wanted, 1, None]}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("al", r"value al, /data/al/x, D:\al\x, final /al", r"value al, /data/<name>/x, D:\<name>\x, final /<name>"),
        ("home", "a home in /home/bob/x", "a <name> in <home>/x"),
        ("val", "value of val in /data/value/val", "value of <name> in /data/value/<name>"),
        ("李明", "模型在李明的文件夹/李明PC", "模型在<name>的文件夹/<name>PC"),
        ("иван", "диван /data/иван/x", "диван /data/<name>/x"),
        ("noé", "noémie and NOÉ", "noémie and <name>"),
        ("a.b", "axb a.b", "axb <name>"),
        ("c", "c:/x and cuda /data/c/x", "c:/x and cuda /data/<name>/x"),
    ],
)  # fmt: skip
def test_a_name_is_taken_out_of_paths_and_where_it_is_a_word(name, text, wanted):
    assert scrub(text, [], [name]) == wanted


def test_keys_stay_and_what_they_call_a_secret_goes():
    data = {"kernel": "kernel", "TORCH_API_KEY": "plain", "min_tokens": 3, "environment": {"X_PASSWORD": "abc"}}
    wanted = {"kernel": "<name>", "TORCH_API_KEY": "<removed>", "min_tokens": 3}
    assert scrub(data, [], ["kernel"]) == {**wanted, "environment": {"X_PASSWORD": "<removed>"}}


NAME = strategies.text("abcxyzäß李明иЯ019", min_size=1, max_size=8).filter(lambda name: name.casefold() != "x")


@hypothesis.given(name=NAME, before=NAME, after=NAME, slash=strategies.sampled_from(["/", "\\", "\\\\"]))
def test_whatever_the_name_no_part_of_a_path_has_it_and_no_word_is_cut(name, before, after, slash):
    path = slash.join(["D:", before, name, after, "x.py"])
    for text in (path, f"in '{path}'", f"{path}: no such file"):
        parts = re.split(r"[\\/\s':]+", scrub(text, [], [name]))
        assert name not in parts and "x.py" in parts
    told = scrub({name: f"x{name}x"}, [], [name])
    assert list(told) == [name]
    if all(letter < "\u2e80" for letter in name):
        assert told[name] == f"x{name}x", "a part of a word is no name"


@pytest.mark.parametrize("name", ["root", "ComfyUI"])
def test_names_that_say_nothing_about_anyone_stay(name, monkeypatch):
    monkeypatch.setenv("USER", name)
    monkeypatch.setenv("HOME", "/srv/someone/")
    assert scrub(f"{name}'s own, /srv/someone/x") == f"{name}'s own, <home>/x"


# The command


def attune(*arguments: str, home: Any, **environment: str) -> subprocess.CompletedProcess:
    values = {**os.environ, "ATTUNE_HOME": str(home), **environment}
    return subprocess.run(
        [sys.executable, str(ROOT), "doctor", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=values,
    )


def test_the_command_is_right_about_this_machine_and_asks_nothing_twice(tmp_path):
    bundle = tmp_path / "bundle.json"
    secret = {"ATTUNE_SECRET_TOKEN": "hf_abcdefghijklmnop", "USER": "alice", "OTHER": "not shown"}
    done = attune("--json", "--bundle", str(bundle), home=tmp_path / "alice", **secret)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["kernels"]}
    here = read_machine()
    for kernel in KERNELS:
        row, reasons = rows[kernel.name], machine_reasons(kernel, here)
        assert (row["verdict"]["outcome"] in ("not installed", "unsupported")) is bool(reasons)
        if kernel.name in ("sdpa", "sdpa_math", "split"):
            assert row["verdict"]["outcome"] == "works", row
            assert row["verdict"]["error"] < row["verdict"]["allowed"]
    written = bundle.read_text("utf-8")
    assert json.loads(written)["kind"] == "attune doctor bundle"
    assert "hf_abc" not in written and "alice" not in written and "not shown" not in written
    again = attune(home=tmp_path / "alice")
    assert again.returncode == 0 and again.stderr == ""
    for kernel in KERNELS:
        assert re.search(
            rf"^{kernel.name} +{kernel.precision} +{rows[kernel.name]['verdict']['outcome']}", again.stdout, re.M
        )
    if here.main_device.architecture is Architecture.CPU:
        assert "Best exact on this device: sdpa, which works." in again.stdout


def test_an_unknown_device_is_named(tmp_path):
    done = attune("--device", "cuda:7", home=tmp_path)
    assert done.returncode == 2 and "unknown device 'cuda:7'" in done.stderr


def test_the_command_tells_which_kernels_failed_in_a_model(tmp_path):
    here, bundle = read_machine(), tmp_path / "bundle.json"
    math, split = (
        guard.Finding(name, guard.Place(1, "self", 64, 64, 2, 64, "float16"), "gave NaN")
        for name in ("sdpa_math", "split")
    )
    for model in ("one", "two"):
        remember(tmp_path, model, [math], BY_NAME, here)
    remember(tmp_path, "one", [split], BY_NAME, replace(here, torch="1.0"))  # of another PyTorch: it holds no more
    done = attune("--json", "--bundle", str(bundle), home=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = "sdpa_math: gave NaN in 2 models sampled here, and is not used there any more"
    for remarks in (json.loads(done.stdout)["remarks"], json.loads(bundle.read_text("utf-8"))["remarks"]):
        (said,) = (one for one in remarks if one.startswith(("sdpa_math: ", "split: ")))
        assert said.startswith(wanted) and "`attune cache clear --verdicts`" in said
    assert wanted in attune(home=tmp_path).stdout
    (tmp_path / "failures.json").write_text("{", "utf-8")
    done = attune(home=tmp_path)
    assert done.returncode == 0 and "in 2 models" not in done.stdout and "failures.json.unreadable" in done.stderr
