"""The kernels that need no package: PyTorch's back ends and our sliced attention."""

from __future__ import annotations

import threading

import pytest
import torch
from standins.cases import BF16, BY_NAME, CASES, F16, F32, ON_CPU, WHOLE, Case, check, collected, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_attune.attention.call import AttentionCall, Layout
from comfyui_attune.attention.errors import measure_errors
from comfyui_attune.attention.reference import reference_attention
from comfyui_attune.kernels import _common, sdpa, split

_ = WHOLE


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func._schema.returns[0].alias_info is None:  # neither view nor in place
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("most", [64, 1000, 2**24])
def test_split_never_makes_more_scores_than_its_bound(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_MOST", most)
    with collected() as each:
        for case in CASES:
            if most < 1000 and case not in CASES[:6] and case.mask is None:
                continue  # thousands of slices each
            with each(case):
                largest = Largest()
                with largest:
                    q, k, v, mask = tensors(case, Layout.BHND)
                    largest.numbers = 0
                    split.run(q, k, v, mask=mask, scale=case.scale)
                width = case.v_dim or case.d
                # One row of scores is the least; keys of one head are brought to float32 as a whole.
                floor = max(case.m, case.m * max(case.d, width))
                out = case.batch * case.heads * case.n * width
                repeated = case.batch * case.heads * case.m * case.d
                assert largest.numbers <= max(most, floor, out)
                if case.kv_heads != case.heads and most < repeated and floor < repeated > out:
                    assert largest.numbers < repeated
                check(BY_NAME["split"], case, BY_NAME["split"].tolerance[case.dtype])


def test_split_counts_its_memory_and_hands_out_the_hosts_order() -> None:
    wan = AttentionCall(1, 40, 40, 75_600, 75_600, 128, 128, BF16, "cuda:0")
    assert (64 << 20) * 0.9 < BY_NAME["split"].workspace_bytes(wan) < 160 << 20
    q, k, v, _mask = tensors(Case(), Layout.BHND)
    assert split.run(q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("case", "scores"),
    [
        (Case(n=4096, m=4096), False),
        (Case(n=4096, m=4096, dtype=F32, mask=(1, 1, _, _)), False),
        (Case(n=4096, m=4096, kv_heads=2, mask=(1, 1, 1, _)), False),  # keys are repeated instead
        (Case(n=4096, m=4096, kv_heads=2, dtype=F32), False),
        (Case(n=4096, m=4096, d=20, mask=(1, 1, 1, _)), True),
        (Case(n=4096, m=4096, v_dim=20), True),
    ],
    ids=str,
)
def test_torchs_choice_on_cuda_counts_scores_only_where_it_writes_them_out(case: Case, scores: bool) -> None:
    call = case.call("cuda:0")
    assert (BY_NAME["sdpa"].workspace_bytes(call) > call.score_bytes) is scores
    assert BY_NAME["sdpa_math"].workspace_bytes(call) > 2 * call.score_bytes


def test_a_row_whose_keys_are_all_hidden_is_zero_in_split_as_in_torch() -> None:
    q, k, v, _mask = tensors(Case(), Layout.BHND)
    mask = torch.ones(1, 1, 33, 33, dtype=torch.bool)
    mask[:, :, 5] = False
    for name in ON_CPU:
        out = BY_NAME[name].load()(q, k, v, mask=mask)
        assert torch.equal(out[:, :, 5], torch.zeros_like(out[:, :, 5])), name


def test_batches_are_split_with_or_without_a_mask_for_each() -> None:
    case = Case(batch=7, mask=(_, 1, 1, _))
    q, k, v, mask = tensors(case, Layout.BHND)
    whole = reference_attention(q, k, v, mask=mask)
    for bias in (mask, mask[:1], None):
        seen = []

        def attend(a, b, c, d, seen=seen):
            seen.append(a.shape[0])
            return torch.nn.functional.scaled_dot_product_attention(a, b, c, attn_mask=d)

        out = sdpa.in_batches(attend, q, k, v, bias, 3)
        assert seen == [3, 3, 1]
        wanted = whole if bias is mask else reference_attention(q, k, v, mask=bias)
        assert measure_errors(out.float(), wanted).l2 < 2e-3


def test_a_wide_mask_in_a_narrow_type_keeps_its_finite_numbers_finite() -> None:
    mask = torch.tensor([[[[float("-inf"), torch.finfo(F32).min, -1e6, 0.5]]]])
    for dtype in (F16, BF16):
        bias = _common.as_bias(mask, dtype).flatten()
        assert bias.isinf().tolist() == [True, False, False, False]
        assert bias[3] == 0.5
    hidden = _common.as_bias(torch.tensor([True, False]), F16)
    assert hidden.tolist() == [0.0, float("-inf")]


def test_forced_back_ends_of_torch_are_the_ones_that_run() -> None:
    q, k, v, _mask = tensors(Case(dtype=F32), Layout.BHND)
    for name, operation in (("sdpa_flash", "flash"), ("sdpa_math", "_math")):
        run = BY_NAME[name].load()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            run(q, k, v)
        ran = [event.key for event in profile.key_averages() if "scaled_dot_product" in event.key]
        assert any(operation in key for key in ran), (name, ran)
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_threads_do_not_see_each_others_back_end() -> None:
    q, k, v, _mask = tensors(Case(dtype=F32, n=5, m=5), Layout.BHND)
    different = v[..., :32]  # torch's flash back end refuses this, the others do not
    flash, plain = BY_NAME["sdpa_flash"].load(), BY_NAME["sdpa"].load()
    failed = []

    def work(run, values):
        try:
            for _turn in range(200):
                run(q, k, values)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in ((flash, v), (plain, different)) for _two in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_the_math_back_end_keeps_float32_sums_where_the_host_turned_them_off() -> None:
    """ComfyUI calls allow_fp16_bf16_reduction_math_sdp(True) when it starts."""
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    run = BY_NAME["sdpa_math"].load()
    q, k, v = (torch.randn(2, 4, 200, 64, generator=torch.Generator().manual_seed(i)).half() for i in range(3))
    try:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        out = run(q, k, v)
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
        assert torch.equal(out, run(q, k, v))
        assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)
