"""Every kernel: right through its stand-in (and the real package where it is), or refused with the right reason."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import standins
from standins.cases import (
    BF16,
    BY_NAME,
    CASES,
    F16,
    ON_CPU,
    ROUNDING,
    STANDINS,
    WHOLE,
    Case,
    check,
    collected,
    pretended,
    tensors,
)

from comfyui_attune.attention.call import AttentionCall, Layout, Mask
from comfyui_attune.attention.kernel import Kernel, call_reasons, machine_reasons, reasons_against
from comfyui_attune.attention.machine import read_machine
from comfyui_attune.kernels import KERNELS, sage, xformers
from support.loading import ROOT

_ = WHOLE


def expected_refusal(name: str, case: Case) -> str:
    """A part of the reason why this kernel must refuse this case on its GPU; "" where it must not.

    Written by hand from what the packages' sources say, and not from the declarations that it checks.
    """
    half, masked, grouped = case.dtype in (F16, BF16), case.mask is not None, case.kv_heads != case.heads
    by_8 = case.d % 8 == 0
    if name.startswith("xformers"):
        if not by_8:
            return "head dimension of 8 to 4096, in steps of 8"
        return "width divisible by 8, this is 20" if case.v_dim == 20 else ""
    if case.v_dim:
        return "values as wide as keys"
    if name.startswith(("flash", "sage")) and masked:
        return "takes no mask"
    if name.startswith(("flash", "sage2", "sage3")) and not half:
        return "needs bfloat16, float16, the tensors are float32"
    match name:
        case "flash2":
            return "1 to 256, this is 264" if case.d > 256 else ""
        case "flash3" | "flash4":
            return "8 to 256, in steps of 8" if not by_8 or case.d > 256 else ""
        case "sage1":
            return "head dimension of 64, 96, 128" if case.d not in (64, 96, 128) else ""
        case "sage3" | "sage3_per_block_mean":
            if grouped:
                return "no grouped-query attention"
            if case.d not in (64, 128):
                return "head dimension of 64, 128"
            return "ignores the scale" if case.scale not in (None, 64**-0.5) else ""
        case "kitchen_int8":
            return "1 to 256, this is 264" if case.d > 256 else ""
        case _:
            return "head dimension of 1 to 128" if case.d > 128 else ""


def refused_for_another_reason(name: str, case: Case) -> bool:
    """Does the package give a right result where we refuse?

    FlashAttention 4 may take values of another width, which nobody has measured; SageAttention 3 hands what is too
    wide for it to torch.
    """
    return (name == "flash4" and case.v_dim == 32) or (name.startswith("sage3") and case.d >= 256)


PAIRS = [(name, variant) for name, (variants, _gpu) in STANDINS.items() for variant in variants]


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_each_adapter_is_right_through_its_stand_in_or_refuses(
    name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, capability = BY_NAME[name], STANDINS[name][1]
    monkeypatch.setenv("ATTUNE_STANDIN_SM", "{}{}".format(*capability))
    with standins.installed(variant):
        machine = pretended(capability)
        assert machine_reasons(kernel, machine) == ()
        with collected() as each:
            for case in CASES:
                with each(case):
                    reasons, wanted = reasons_against(kernel, case.call(), machine), expected_refusal(name, case)
                    if wanted:
                        assert wanted in "; ".join(reasons)
                        # A refusal that is not needed would be a loss: what is refused does fail or come out wrong.
                        if not refused_for_another_reason(name, case):
                            with pytest.raises(Exception):  # noqa: B017
                                check(kernel, case, 0.05)
                    else:
                        assert reasons == ()
                        check(kernel, case, min(kernel.tolerance[case.dtype], ROUNDING[case.dtype]))


def cpu_refusal(name: str, case: Case) -> str:
    return "values as wide as keys" if name == "sdpa_flash" and case.v_dim else ""


@pytest.mark.parametrize("name", ON_CPU)
def test_kernels_of_torch_and_our_own_are_right_on_the_cpu(name: str) -> None:
    kernel, machine = BY_NAME[name], read_machine()
    with collected() as each:
        for case in CASES:
            with each(case):
                reasons, wanted = call_reasons(kernel, case.call("cpu"), machine), cpu_refusal(name, case)
                if wanted:
                    assert wanted in "; ".join(reasons)
                else:
                    assert reasons == ()
                    check(kernel, case, kernel.tolerance[case.dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_NAME)
def test_the_real_package_is_right_on_this_gpu(name: str) -> None:
    kernel, machine = BY_NAME[name], read_machine()
    if reasons := machine_reasons(kernel, machine):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    device = machine.main_device.name
    with collected() as each:
        for case in CASES:
            if not call_reasons(kernel, case.call(device), machine):
                with each(case):
                    check(kernel, case, kernel.tolerance[case.dtype], device)


def test_names_and_order_never_change() -> None:
    stable = [
        *("sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "xformers", "xformers_cutlass"),
        *("flash2", "flash3", "flash4", "sage1", "sage2_fp16_triton", "sage2_fp16_cuda", "sage2_fp8_cuda"),
        *("sage2_fp8_cuda_pp", "sage3", "sage3_per_block_mean", "kitchen_int8", "attune_int8", "split"),
        "attune_bf16",
    ]
    names = [kernel.name for kernel in KERNELS]
    assert names == stable
    # The pack's own are tested in test_int8.py.
    assert set(STANDINS) | set(ON_CPU) | {"sdpa_efficient", "sdpa_cudnn", "attune_int8", "attune_bf16"} >= set(names)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_declarations_are_complete(kernel: Kernel) -> None:
    assert kernel.title
    assert set(kernel.tolerance) == set(kernel.needs.dtypes)
    assert all(0 < error < 0.5 for error in kernel.tolerance.values())
    if kernel.package not in ("", "torch"):
        assert kernel.install and kernel.url
    wan = AttentionCall(1, 40, 40, 75_600, 75_600, 128, 128, BF16, "cuda:0")
    assert 0 <= kernel.workspace_bytes(wan) < (1 << 50)
    grouped = AttentionCall(2, 24, 8, 512, 77, 40, 40, BF16, "cuda:0", mask=Mask("bool", (2, 1, 1, 77)), scale=-0.1)
    assert isinstance(kernel.workspace_bytes(grouped), int)


def test_nothing_is_imported_before_a_kernel_is_loaded(tmp_path: Path) -> None:
    """With every package importable, in a fresh interpreter."""
    code = (
        "import json, sys\n"
        "from support.loading import ROOT, load_package\n"
        "load_package('comfyui_attune', ROOT)\n"
        "from comfyui_attune.attention.machine import read_machine\n"
        "import comfyui_attune.kernels, torch\n"
        "machine = read_machine()\n"
        "names = sorted(name for name in sys.modules if name.partition('.')[0] in "
        f"{standins._NAMES!r})\n"
        "print(json.dumps([names, torch.cuda.is_initialized(), dict(machine.packages)]))\n"
    )
    folders = [ROOT / "tests", *(standins.HERE / name for name in ("sage2", "sage3", "flash2", "flash3", "flash4"))]
    folders += [standins.HERE / name for name in ("xformers", "kitchen")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    imported, cuda_started, packages = json.loads(done.stdout)
    assert imported == []
    assert not cuda_started
    assert packages["sageattention"] == "2.2.0" and packages["xformers"] == "0.0.35"
    assert packages["comfy_kitchen"] == "0.2.40"


# Kernel, GPU, packages or other changes to the machine, a part of the reason ("" = runs).


def loaded_calls(variant: str, module: str, kernel: str) -> Iterator[dict]:
    """Run the plain case through `kernel` and give what the stand-in was called with."""
    with standins.installed(variant):
        check(BY_NAME[kernel], Case(), 0.05)
        yield from import_module(module).CALLS


def test_sage3_asks_for_no_mean_per_block_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTUNE_STANDIN_SM", "120")
    assert [c["per_block_mean"] for c in loaded_calls("sage3", "sageattn3.api", "sage3")] == [False]
    assert [c["per_block_mean"] for c in loaded_calls("sage3", "sageattn3.api", "sage3_per_block_mean")] == [True]


@pytest.mark.parametrize(
    ("name", "gpu", "function", "options"),
    [
        ("sage2_fp16_triton", (8, 6), "fp16_triton", {}),
        ("sage2_fp16_cuda", (8, 0), "fp16_cuda", {"pv_accum_dtype": "fp32"}),
        ("sage2_fp8_cuda", (8, 9), "fp8_cuda", {"pv_accum_dtype": "fp32+fp32", "qk_quant_gran": "per_thread"}),
        ("sage2_fp8_cuda", (9, 0), "fp8_cuda_sm90", {"pv_accum_dtype": "fp32+fp32"}),
        ("sage2_fp8_cuda", (12, 0), "fp8_cuda", {"pv_accum_dtype": "fp32+fp32", "qk_quant_gran": "per_warp"}),
        ("sage2_fp8_cuda_pp", (8, 9), "fp8_cuda", {"pv_accum_dtype": "fp32+fp16"}),
        ("sage2_fp8_cuda_pp", (12, 0), "fp8_cuda", {"pv_accum_dtype": "fp32+fp16", "qk_quant_gran": "per_warp"}),
    ],
)
def test_sage2_calls_the_function_made_for_the_gpu(name, gpu, function, options, monkeypatch) -> None:
    monkeypatch.setattr(sage, "capability", lambda _tensor: gpu)
    monkeypatch.setenv("ATTUNE_STANDIN_SM", "{}{}".format(*gpu))
    (call,) = loaded_calls("sage2", "sageattention", name)
    assert call["name"] == function and call["tensor_layout"] == "NHD"
    assert options.items() <= call.items()


@pytest.mark.parametrize(
    ("name", "gpu", "operator"),
    [
        ("xformers", (8, 9), "fa2F"),  # never FlashAttention 3 off Hopper
        ("xformers", (9, 0), "fa3F"),
        ("xformers", (12, 0), "fa2F"),
        ("xformers", (7, 5), "cutlassF"),
        ("xformers_cutlass", (8, 9), "cutlassF"),
    ],
)
def test_xformers_runs_the_operator_that_is_safe_on_the_gpu(name, gpu, operator, monkeypatch) -> None:
    monkeypatch.setattr(xformers, "capability", lambda _tensor: gpu)
    monkeypatch.setenv("ATTUNE_STANDIN_SM", "{}{}".format(*gpu))
    (call,) = loaded_calls("xformers", "xformers.ops.fmha", name)
    assert call["op"].startswith(operator)


def test_a_function_that_the_package_lacks_is_named() -> None:
    with standins.installed("sage1"), pytest.raises(ImportError, match="has no sageattn_qk_int8_pv_fp16_cuda"):
        BY_NAME["sage2_fp16_cuda"].load()


def test_kitchen_without_its_compiled_part_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTUNE_STANDIN_SM", "70")
    with standins.installed("kitchen"), pytest.raises(ImportError, match="compiled part does not run int8"):
        BY_NAME["kitchen_int8"].load()


def test_no_lossy_adapter_hands_over_a_mask_that_would_be_ignored() -> None:
    q, k, v, mask = tensors(Case(mask=(1, 1, _, _)), Layout.BNHD)
    for name, (variants, _gpu) in STANDINS.items():
        if name.startswith(("sage", "flash")):
            with standins.installed(variants[0]), pytest.raises(ValueError, match="mask"):
                BY_NAME[name].load()(q, k, v, mask=mask)


def test_the_mean_per_block_of_sage3_costs_what_is_known() -> None:
    """6.7 + 3.3 GiB at 75,600 tokens and 40 heads, in float32 and bfloat16."""
    wan = AttentionCall(1, 40, 40, 75_600, 75_600, 128, 128, BF16, "cuda:0")
    extra = BY_NAME["sage3_per_block_mean"].workspace_bytes(wan) - BY_NAME["sage3"].workspace_bytes(wan)
    assert extra / 2**30 == pytest.approx(10.0, rel=0.01)


def test_copies_of_k_are_counted() -> None:
    wan = AttentionCall(1, 40, 40, 32_760, 32_760, 128, 128, BF16, "cuda:0")
    k_bytes = 40 * 32_760 * 128 * 2
    assert BY_NAME["sage1"].workspace_bytes(wan) >= 2 * k_bytes
    assert BY_NAME["flash2"].workspace_bytes(wan) == 4 * 40 * 32_760
    negative = dataclasses.replace(wan, scale=-1.0)
    assert BY_NAME["flash2"].workspace_bytes(negative) == 4 * 40 * 32_760 + k_bytes
