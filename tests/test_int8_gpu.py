"""attune_int8 and attune_bf16 at real sizes. Nothing here has run yet where docs/unmeasured.md names it.

How fast they are is not asked here: benchmarks/int8.py.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from standins.cases import BF16, BY_NAME, DTYPES, F16, F32, Case, tensors
from test_int8 import OURS, cases, extremes, relative_error, tolerance, within_the_values
from test_int8_accuracy import GROWTH, LENGTHS, hold_all

from comfyui_attune.attention.call import AttentionCall, Layout
from comfyui_attune.attention.errors import Errors, measure_errors
from comfyui_attune.attention.kernel import Run, machine_reasons
from comfyui_attune.attention.machine import read_machine
from comfyui_attune.attention.reference import reference_attention
from support.int8_recipes import KINDS, exact, make_case, sage2
from support.loading import ROOT

pytestmark = pytest.mark.gpu


def run_of(name: str) -> Run:
    if reasons := machine_reasons(BY_NAME[name], read_machine()):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    return BY_NAME[name].load()


def attend(name: str, *qkv: torch.Tensor, **options: Any) -> torch.Tensor:
    """(B, H, tokens, D) on the GPU, in and out."""
    return run_of(name)(*(tensor.transpose(1, 2) for tensor in qkv), **options).transpose(1, 2)


@functools.cache
def errors(kind: str, length: int, dtype: torch.dtype) -> tuple[Errors, Errors]:
    """Of the kernel, and of SageAttention 2's recipe with its output in the same type."""
    q, k, v = make_case(kind, 256, length, device="cuda")
    wanted = exact(q, k, v)
    ours = attend("attune_int8", *(tensor.to(dtype) for tensor in (q, k, v)))
    return measure_errors(ours, wanted), measure_errors(sage2(q, k, v).to(dtype), wanted)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_accuracy_table(kind: str, length: int) -> None:
    for dtype in (F32, BF16):  # inputs are bfloat16's numbers, so exact in both; the output is rounded once more
        hold_all(*errors(kind, length, dtype), kind, length)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_do_not_grow_with_the_length(kind: str) -> None:
    short, long = (errors(kind, length, F32)[0].l2 for length in (8192, 75_600))
    assert long <= GROWTH * short


def enlarged(case: Case) -> Case:
    """The call with tiles enough for every loop to turn, and more heads than one."""
    return replace(case, n=case.n * 11, m=case.m * 37, heads=case.heads * 4, kv_heads=case.kv_heads * 4)


@settings(max_examples=100, deadline=None)
@given(drawn=cases(DTYPES))
def test_int8_is_right_whatever_the_call(drawn) -> None:
    check("attune_int8", enlarged(drawn[0]))


@settings(max_examples=100, deadline=None)
@given(drawn=cases((F16, BF16)))
def test_bf16_is_right_whatever_the_call(drawn) -> None:
    check("attune_bf16", enlarged(drawn[0]))


@settings(max_examples=50, deadline=None)
@given(drawn=cases((F16, BF16)))
@pytest.mark.parametrize("name", OURS)
def test_small_calls_are_right_as_well(name: str, drawn) -> None:
    check(name, drawn[0])


def check(name: str, case: Case) -> None:
    on_gpu = [None if tensor is None else to_gpu(tensor) for tensor in tensors(case, Layout.BHND)]
    q, k, v, mask = on_gpu
    out = attend(name, q, k, v, mask=mask, scale=case.scale)
    error = relative_error(out, q, k, v, mask, case.scale)
    assert error <= tolerance(name, case), f"{case}: relative L2 error {error:.2g}"


def to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the GPU with the strides and the alignment it has: cuda() would make it dense."""
    offset = tensor.storage_offset()
    room = torch.zeros(offset + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))
    room = room.to("cuda", tensor.dtype)
    return room.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    "shape",
    [(1, 40, 32_760, 32_760, 128), (1, 40, 75_600, 512, 128), (1, 24, 4608, 4608, 128), (2, 10, 4096, 4096, 64)],
    ids=["Wan", "Wan, text", "Flux", "SDXL"],
)
def test_calls_of_models_are_right(name: str, shape: tuple[int, ...]) -> None:
    """128 queries of each head, from the first to the last, against float64."""
    batch, heads, q_len, kv_len, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, heads, dim, dtype=BF16, device="cuda", generator=generator).transpose(1, 2)
        for length in (q_len, kv_len, kv_len)
    )
    q = q * 2  # scores with a spread of 2: some keys count, others do not
    out = attend(name, q, k, v)
    rows = torch.linspace(0, q_len - 1, 128, device="cuda").long()
    for head in range(heads):
        one = slice(head, head + 1)
        wanted = reference_attention(q[:, one, rows], k[:, one], v[:, one], dtype=torch.float64)
        assert measure_errors(out[:, one, rows], wanted).l2 <= BY_NAME[name].tolerance[BF16], head


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "token", "head"])
@pytest.mark.parametrize("name", OURS)
def test_tensors_may_reach_beyond_two_to_the_31(name: str, axis: int) -> None:
    shape, strides = [2, 300, 2, 64], [128 * 300, 128, 64, 1]
    shape[axis], strides[axis] = 3, 2**30
    if axis == 1:
        strides[0] = 1024
    room = torch.empty(2**31 + 2**18, dtype=F16, device="cuda")
    far = room.as_strided(shape, strides)
    far.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    near, run = far.contiguous(), run_of(name)
    assert torch.equal(run(far, far, far), run(near, near, near))


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_inputs_give_finite_outputs_within_the_values(dtype: torch.dtype) -> None:
    for name, qkv in extremes(dtype, length=700):
        on_gpu = [tensor.cuda() for tensor in qkv]
        for scale in (None, -1e4, 3e38) if name.startswith(("largest", "all")) else (None,):
            within_the_values(attend("attune_int8", *on_gpu, scale=scale), on_gpu[2], (name, scale))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_not_finite_is_not_hidden(bad: float, place: str) -> None:
    qkv = dict(zip("qkv", torch.randn(3, 1, 1, 700, 128, device="cuda").half(), strict=True))
    qkv[place][0, 0, 5, 100] = bad
    out = attend("attune_int8", *qkv.values())
    spoilt = {"q": out[0, 0, 5], "k": out[0, 0], "v": out[0, 0, :, 100]}[place]
    assert not torch.isfinite(spoilt).any()


@pytest.mark.parametrize("name", OURS)
def test_the_same_input_gives_the_same_bits_twenty_times_while_the_gpu_is_busy(name: str) -> None:
    run = run_of(name)
    q, k, v = (torch.randn(1, 8192, 24, 128, dtype=F16, device="cuda") for _ in range(3))
    first = run(q, k, v)
    torch.cuda.synchronize()
    other, load = torch.cuda.Stream(), torch.randn(4096, 4096, dtype=F16, device="cuda")
    for _ in range(20):
        with torch.cuda.stream(other):
            torch.mm(load, load)
        assert torch.equal(run(q, k, v), first)


@pytest.mark.parametrize("name", OURS)
def test_a_call_waits_for_nothing_and_takes_the_memory_that_it_says(name: str) -> None:
    run, shape = run_of(name), (1, 8192, 24, 128)
    q, k, v = (torch.randn(shape, dtype=F16, device="cuda") for _ in range(3))
    first = run(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before - first.untyped_storage().nbytes()
    call = AttentionCall(1, 24, 24, 8192, 8192, 128, 128, F16, "cuda:0")
    assert extra <= BY_NAME[name].workspace_bytes(call) + (1 << 20)  # the allocator rounds up


@pytest.mark.parametrize(("name", "most"), [("attune_int8", 3), ("attune_bf16", 1)])
def test_a_call_is_few_launches(name: str, most: int) -> None:
    run = run_of(name)
    qkv = [torch.randn(1, 512, 4, 64, dtype=F16, device="cuda") for _ in range(3)]
    run(*qkv)
    torch.cuda.synchronize()
    for _ in range(2):  # what a first call does otherwise is no rule
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(*qkv)
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() if event.device_type is torch.autograd.DeviceType.CUDA]
        assert 1 <= len(kernels) <= most, [event.name for event in kernels]


@pytest.mark.parametrize("name", OURS)
def test_a_kernel_compiles_into_an_empty_cache(name: str, tmp_path) -> None:
    """As at its first use, in a process and a folder of its own; benchmarks/int8.py tells how long that takes."""
    run_of(name)
    program = [sys.executable, str(ROOT / "benchmarks" / "int8.py"), "--first-use", name]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0
    assert any(tmp_path.rglob("*.cubin"))
