"""What kernels refuse: known-bad combinations of versions and GPUs, calls that a GPU cannot do, versions compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from standins.cases import BF16, BY_NAME, F32, WHOLE, Case, pretended

from comfyui_attune.attention.kernel import call_reasons, machine_reasons, reasons_against
from comfyui_attune.attention.machine import installed_packages
from comfyui_attune.kernels import KERNELS, _common

_ = WHOLE

# Kernel, GPU, packages or other changes to the machine, a part of the reason ("" = runs).
KNOWN_BAD: list[tuple[str, tuple[int, int] | None, dict[str, Any], str]] = [
    ("xformers", (12, 0), {"xformers": "0.0.30"}, "runs Hopper's kernels on sm_120"),
    ("xformers", (12, 0), {"xformers": "0.0.32.post2"}, "needs 0.0.33 or newer"),
    ("xformers", (10, 0), {"xformers": "0.0.31.post1"}, "runs Hopper's kernels on sm_100"),
    ("xformers", (9, 0), {"xformers": "0.0.32.post2"}, ""),
    ("xformers", (12, 0), {"xformers": "0.0.33.post2"}, ""),
    ("xformers", (12, 0), {"xformers": "0.0.29.post3"}, ""),
    ("xformers_cutlass", (12, 0), {"xformers": "0.0.32.post2"}, ""),
    ("xformers_cutlass", (12, 0), {"xformers": "0.0.35"}, "needs sm_90 or older, this GPU is sm_120"),
    ("xformers", (8, 9), {"xformers": "0.0.30", "flash_attn": "2.8.3"}, "it needs 2.7.1 to 2.7.4, or none"),
    ("xformers", (8, 9), {"xformers": "0.0.30", "flash_attn": "2.7.4.post1"}, ""),
    ("xformers_cutlass", (8, 9), {"xformers": "0.0.31", "flash_attn": "2.8.2"}, "beside flash-attn 2.8.2"),
    ("xformers", (8, 9), {"xformers": "0.0.32.post2+cu128", "flash_attn": "2.8.3"}, "2.7.1 to 2.8.2"),
    ("xformers", (8, 9), {"xformers": "0.0.35", "flash_attn": "2.8.3.post2"}, ""),
    ("xformers", (8, 9), {"xformers": "0.0.35", "flash_attn": "2.6.3"}, "beside flash-attn 2.6.3"),
    ("xformers", (8, 9), {"xformers": "0.0.35", "flash_attn": "2.8.4"}, ""),
    ("xformers", (8, 9), {"xformers": "0.0.35", "flash_attn": "2.8.4.post1"}, "beside flash-attn 2.8.4.post1"),
    ("xformers", (8, 9), {"xformers": "0.0.31.post1", "flash_attn": "2.8.0.post2"}, ""),
    ("xformers", (8, 9), {"xformers": "0.0.29.post3", "flash_attn": "2.8.3"}, ""),
    ("xformers", (8, 9), {"xformers": "0.0.35", "flash_attn": "", "flash_attn.cute": "4.0.0b36"}, "FlashAttention 4"),
    ("flash2", (7, 5), {"flash_attn": "2.8.3"}, "needs sm_80 or newer, this GPU is sm_75 (Turing)"),
    ("flash2", (8, 9), {"flash_attn": "", "flash_attn.cute": "4.0.0b36"}, "flash-attn itself is not installed"),
    ("flash2", (8, 9), {"flash_attn": "1.0.9"}, "2.0 or newer"),
    ("flash2", (8, 9), {}, "package flash_attn is not installed (pip install"),
    ("flash3", (8, 9), {"flash_attn_interface": "3.0.0b1"}, "needs sm_90, this GPU is sm_89"),
    ("flash3", (12, 0), {"flash_attn_interface": "3.0.0b1"}, "needs sm_90, this GPU is sm_120"),
    ("flash4", (9, 0), {"flash_attn": "2.8.3", "flash_attn.cute": ""}, "flash-attn-4 itself is not installed"),
    ("flash4", (12, 0), {"flash_attn.cute": "4.0.0b4"}, "4.0.0b5 or newer, installed is 4.0.0b4"),
    ("flash4", (8, 0), {"flash_attn.cute": "4.0.0b4"}, "(for sm_80)"),
    ("flash4", (8, 0), {"flash_attn.cute": "4.0.0b5"}, ""),
    ("flash4", (10, 0), {"flash_attn.cute": "4.0.0b4"}, ""),
    ("flash4", (12, 0), {"flash_attn.cute": "4.0.0b36"}, ""),
    ("flash4", (7, 5), {"flash_attn.cute": "4.0.0b36"}, "this GPU is sm_75"),
    ("sage1", (8, 9), {"sageattention": "2.2.0"}, "below 2, installed is 2.2.0"),
    ("sage1", (7, 5), {"sageattention": "1.0.6"}, "sm_80 or newer"),
    ("sage2_fp16_cuda", (8, 0), {"sageattention": "1.0.6"}, "SageAttention 1 has none of these functions"),
    *(
        (name, (10, 0), {"sageattention": "2.2.0"}, "this GPU is sm_100 (Blackwell (data center))")
        for name in ("sage2_fp16_triton", "sage2_fp16_cuda", "sage2_fp8_cuda", "sage2_fp8_cuda_pp")
    ),
    ("sage2_fp8_cuda", (12, 0), {"sageattention": "2.0.0"}, "2.1 or newer, installed is 2.0.0 (for sm_120)"),
    ("sage2_fp8_cuda", (12, 0), {"sageattention": "2.1.1"}, ""),
    ("sage2_fp8_cuda", (12, 1), {"sageattention": "2.2.0.post4+cu128torch2.9.0"}, ""),
    ("sage2_fp8_cuda", (8, 6), {"sageattention": "2.2.0"}, "needs sm_89 to sm_90, sm_120 to sm_121"),
    ("sage2_fp8_cuda", (9, 0), {"sageattention": ""}, ""),
    ("sage2_fp8_cuda_pp", (8, 9), {"sageattention": "2.1.1"}, "older ones return garbage"),
    ("sage2_fp8_cuda_pp", (8, 9), {"sageattention": "2.2.0", "_cuda": "12.6"}, "CUDA 12.8 or newer, torch was built"),
    ("sage2_fp16_triton", (12, 0), {"sageattention": "2.2.0"}, "needs sm_80 to sm_90"),
    ("sage2_fp16_cuda", (8, 0), {"sageattention": "2.2.0", "_triton": None}, "needs Triton"),
    ("sage2_fp8_cuda", None, {"sageattention": "2.2.0"}, "needs an NVIDIA GPU"),
    ("sage3", (12, 1), {"sageattn3": "1.0.0"}, ""),
    ("sage3", (10, 3), {"sageattn3": "1.0.0"}, "needs sm_120 to sm_121, this GPU is sm_103"),
    ("sage3", (9, 0), {"sageattn3": "1.0.0"}, "this GPU is sm_90 (Hopper)"),
    ("sage3_per_block_mean", (12, 0), {"sageattn3": "1.0.0", "_cuda": "12.6"}, "CUDA 12.8"),
    ("kitchen_int8", (8, 9), {"comfy_kitchen": "0.2.26"}, "0.2.40 or newer, installed is 0.2.26"),
    ("kitchen_int8", (8, 9), {"comfy_kitchen": "0.2.36"}, "missing or faulty before"),
    ("kitchen_int8", (7, 0), {"comfy_kitchen": "0.2.40"}, "needs sm_75 or newer"),
    ("kitchen_int8", None, {"comfy_kitchen": "0.2.41"}, ""),
    ("sdpa_cudnn", (10, 3), {}, "no valid execution plans on sm_103"),
    ("sdpa_cudnn", None, {}, "needs an NVIDIA GPU"),
    ("sdpa_flash", (7, 5), {}, "needs sm_80 or newer"),
    ("sdpa_flash", None, {}, ""),
    ("sdpa_efficient", (7, 0), {}, ""),
]


@pytest.mark.parametrize(
    ("name", "capability", "found", "wanted"), KNOWN_BAD, ids=lambda value: str(value).replace(" ", "")[:40]
)
def test_what_a_machine_cannot_run_is_refused_by_version_and_gpu(
    name: str, capability: tuple[int, int] | None, found: dict[str, Any], wanted: str
) -> None:
    changes = {key[1:]: value for key, value in found.items() if key.startswith("_")}
    packages = {key: value for key, value in found.items() if not key.startswith("_")}
    reasons = machine_reasons(BY_NAME[name], pretended(capability, packages=packages, **changes))
    if wanted:
        assert wanted in "; ".join(reasons)
    else:
        assert reasons == ()


def test_the_comfy_kitchen_that_comfyui_installs_is_refused_by_its_version() -> None:
    packages = installed_packages()
    if packages.get("comfy_kitchen") != "0.2.26":
        pytest.skip(f"needs comfy-kitchen 0.2.26, here is {packages.get('comfy_kitchen', 'none')}")
    reasons = "; ".join(machine_reasons(BY_NAME["kitchen_int8"], pretended((8, 9))))
    assert "needs comfy_kitchen 0.2.40 or newer, installed is 0.2.26" in reasons


# Kernel, GPU, case, changes to the machine, a part of the reason ("" = runs).
CALLS_ON_A_GPU: list[tuple[str, tuple[int, int], Case, dict[str, Any], str]] = [
    ("sdpa_flash", (9, 0), Case(mask=(1, 1, _, _)), {}, "takes no mask on CUDA"),
    ("sdpa_flash", (9, 0), Case(dtype=F32), {}, "needs float16 or bfloat16 on CUDA"),
    ("sdpa_flash", (9, 0), Case(d=264), {}, "at most 256 on CUDA"),
    ("sdpa_flash", (9, 0), Case(kv_heads=2), {}, ""),
    ("sdpa_efficient", (9, 0), Case(kv_heads=2), {}, "no grouped-query attention"),
    ("sdpa_efficient", (9, 0), Case(d=20), {}, "in steps of 8"),
    ("sdpa_efficient", (9, 0), Case(v_dim=20), {}, "width divisible by 8"),
    ("sdpa_efficient", (9, 0), Case(v_dim=32, mask=(1, 1, _, _)), {}, ""),
    ("sdpa_cudnn", (9, 0), Case(d=160), {}, "8 to 128, in steps of 8"),
    ("sdpa_cudnn", (10, 0), Case(), {}, "gives wrong numbers below 8 key heads, this has 4"),
    ("sdpa_cudnn", (10, 0), Case(), {"torch": "2.13.1"}, "below 8 key heads"),
    ("sdpa_cudnn", (10, 0), Case(), {"torch": "2.14.0"}, ""),
    ("sdpa_cudnn", (10, 0), Case(heads=8, kv_heads=8), {}, ""),
    ("xformers", (12, 0), Case(mask=(1, 1, _, _)), {"xformers": "0.0.35"}, "on sm_120 needs no mask"),
    ("xformers", (12, 0), Case(dtype=F32), {"xformers": "0.0.35"}, "needs float16 or bfloat16"),
    ("xformers", (12, 0), Case(d=264), {"xformers": "0.0.35"}, "one head dimension of at most 256"),
    ("xformers", (12, 0), Case(), {"xformers": "0.0.35"}, ""),
    ("xformers", (7, 5), Case(dtype=BF16), {"xformers": "0.0.35"}, "needs sm_80 or newer for bfloat16"),
    ("xformers_cutlass", (8, 9), Case(batch=2, heads=40_000, kv_heads=40_000), {"xformers": "0.0.26"}, "65535"),
    ("xformers_cutlass", (8, 9), Case(batch=2, heads=40_000, kv_heads=40_000), {"xformers": "0.0.27"}, ""),
    ("flash4", (9, 0), Case(d=256), {"flash_attn.cute": "4.0.0b36"}, ""),
    ("flash4", (10, 0), Case(d=256), {"flash_attn.cute": "4.0.0b36"}, ""),
    ("flash4", (10, 0), Case(d=256), {"flash_attn.cute": "4.0.0b11"}, ""),
    (
        "flash4",
        (10, 0),
        Case(d=256),
        {"flash_attn.cute": "4.0.0b10"},
        "4.0.0b11 or newer, installed is 4.0.0b10 (for a",
    ),
    (
        "flash4",
        (11, 0),
        Case(d=256),
        {"flash_attn.cute": "4.0.0b14"},
        "4.0.0b18 or newer, installed is 4.0.0b14 (for a",
    ),
    ("flash4", (11, 0), Case(d=256), {"flash_attn.cute": "4.0.0b36"}, ""),
    ("flash4", (10, 0), Case(d=192), {"flash_attn.cute": "4.0.0b36"}, "at most 128 or of 256 on sm_100"),
    ("flash4", (12, 0), Case(d=256), {"flash_attn.cute": "4.0.0b36"}, "at most 128 on sm_120"),
]


@pytest.mark.parametrize(("name", "capability", "case", "found", "wanted"), CALLS_ON_A_GPU, ids=str)
def test_what_a_gpu_cannot_do_with_a_call_is_refused(
    name: str, capability: tuple[int, int], case: Case, found: dict[str, str], wanted: str
) -> None:
    packages = {key: value for key, value in found.items() if key != "torch"}
    machine = pretended(capability, packages=packages, torch=found.get("torch", "2.11.0+cu130"))
    reasons = reasons_against(BY_NAME[name], case.call(), machine)
    assert wanted in "; ".join(reasons) if wanted else reasons == ()


def test_lossy_kernels_refuse_a_call_that_forbids_them() -> None:
    call = dataclasses.replace(Case().call(), lossy_allowed=False)
    for kernel in KERNELS:
        reasons = "; ".join(call_reasons(kernel, call, pretended((8, 9))))
        assert ("is lossy, the model forbids low precision" in reasons) is (kernel.precision == "lossy")
    lossy = {kernel.name for kernel in KERNELS if kernel.precision == "lossy"}
    assert lossy == {name for name in BY_NAME if name.startswith(("sage", "kitchen", "attune_int8"))}


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("2.0.0", "2.1"),
        ("0.0.30", "0.0.32.post2"),
        ("0.0.32", "0.0.32.post1"),
        ("4.0.0b4", "4.0.0b12"),
        ("4.0.0b36", "4.0.0"),
        ("3.0.0.b1", "3.0.0"),
        ("2.2.0.dev1", "2.2.0"),
        ("2.2.0rc1", "2.2.0+cu128"),
        ("0.2.9", "0.2.26"),
        ("12.6", "12.8"),
    ],
)
def test_versions_compare_as_their_packages_mean_them(older: str, newer: str) -> None:
    a, b = _common.parse_version(older), _common.parse_version(newer)
    assert a is not None and b is not None and a < b


def test_what_is_no_version_is_not_compared() -> None:
    assert _common.parse_version("") is None and _common.parse_version("unknown") is None
    assert _common.parse_version("2.2.0+cu128torch2.9") == _common.parse_version("2.2")
