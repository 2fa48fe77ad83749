"""attune_int8 and attune_bf16 at real sizes. Nothing here has run yet where docs/unmeasured.md names it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from standins.cases import BY_NAME, DTYPES, F16, F32, Case, tensors
from test_int8 import OURS, cases, extremes, relative_error, tolerance
from test_int8_accuracy import LENGTHS, hold

from comfyui_attune.attention.call import AttentionCall, Layout
from comfyui_attune.attention.errors import measure_errors
from comfyui_attune.attention.kernel import machine_reasons
from comfyui_attune.attention.machine import read_machine
from support.int8_recipes import KINDS, exact, make_case, sage2

pytestmark = pytest.mark.gpu


def attend(name: str, *qkv: torch.Tensor, **options) -> torch.Tensor:
    """(B, H, tokens, D) on the GPU, whatever device they come from; back on the CPU."""
    kernel = BY_NAME[name]
    if reasons := machine_reasons(kernel, read_machine()):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    options = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    return kernel.load()(*(t.cuda().transpose(1, 2) for t in qkv), **options).transpose(1, 2).cpu()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_accuracy_table(kind: str, length: int) -> None:
    q, k, v = make_case(kind, 256, length, heads=2)
    wanted = exact(q, k, v)
    found = measure_errors(attend("attune_int8", *(t.bfloat16() for t in (q, k, v))).double(), wanted.bfloat16())
    hold(found, kind)
    assert found.l2 <= 1.1 * measure_errors(sage2(q, k, v), wanted).l2 + 2e-3  # bfloat16's own rounding


@settings(max_examples=100, deadline=None)
@given(drawn=cases(DTYPES))
def test_int8_is_right_whatever_the_call(drawn) -> None:
    check("attune_int8", drawn[0])


@settings(max_examples=100, deadline=None)
@given(drawn=cases((F16, torch.bfloat16)))
def test_bf16_is_right_whatever_the_call(drawn) -> None:
    check("attune_bf16", drawn[0])


def check(name: str, case: Case) -> None:
    q, k, v, mask = tensors(case, Layout.BHND)
    options = {} if mask is None else {"mask": mask}
    error = relative_error(attend(name, q, k, v, scale=case.scale, **options), q, k, v, mask, case.scale)
    assert error <= tolerance(name, case), f"{case}: relative L2 error {error:.2g}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_inputs_give_finite_outputs(dtype: torch.dtype) -> None:
    for name, qkv in extremes(dtype):
        for scale in (None, -1e4, 3e38):
            assert torch.isfinite(attend("attune_int8", *qkv, scale=scale)).all(), (name, scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_not_finite_is_not_hidden(bad: float, place: str) -> None:
    qkv = dict(zip("qkv", torch.randn(3, 1, 1, 300, 128).half(), strict=True))
    qkv[place][0, 0, 5, 100] = bad
    assert not torch.isfinite(attend("attune_int8", *qkv.values())).all()


@pytest.mark.parametrize("name", OURS)
def test_a_call_is_the_same_each_time_waits_for_nothing_and_takes_what_it_says(name: str) -> None:
    kernel = BY_NAME[name]
    if reasons := machine_reasons(kernel, read_machine()):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    run, shape = kernel.load(), (1, 8192, 24, 128)
    q, k, v = (torch.randn(shape, dtype=F16, device="cuda") for _ in range(3))
    first = run(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before - first.untyped_storage().nbytes()
    assert torch.equal(first, again)
    call = AttentionCall(1, 24, 24, 8192, 8192, 128, 128, F16, "cuda:0")
    assert extra <= kernel.workspace_bytes(call) + (1 << 20)  # the allocator rounds up


@pytest.mark.parametrize(("name", "most"), [("attune_int8", 3), ("attune_bf16", 1)])
def test_a_call_is_few_launches(name: str, most: int) -> None:
    qkv = [torch.randn(1, 4, 512, 64, dtype=F32).to(F16) for _ in range(3)]
    attend(name, *qkv)
    device = [t.cuda().transpose(1, 2) for t in qkv]
    run = BY_NAME[name].load()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(*device)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type is torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= most
