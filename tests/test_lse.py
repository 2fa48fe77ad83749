"""Kernels that give their log-sum-exp: right, and enough to join the parts of a call, as ring attention does."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import standins
import torch
from standins.cases import BY_NAME, CASES, F32, ON_CPU, STANDINS, Case, collected, pretended, tensors

from comfyui_attune.attention.call import Layout
from comfyui_attune.attention.errors import measure_errors
from comfyui_attune.attention.kernel import Kernel, reasons_against
from comfyui_attune.attention.machine import read_machine
from comfyui_attune.attention.reference import reference_attention

WITH_LSE = [name for name, kernel in BY_NAME.items() if kernel.load_lse is not None]
# FlashAttention 3 as in the sources of 2.8.3 gives none: its early builds do, and later ones that are asked.
PAIRS = [(name, "") for name in ON_CPU if name in WITH_LSE] + [
    (name, variant)
    for name, (variants, _gpu) in STANDINS.items()
    for variant in variants
    if name in WITH_LSE and variant != "flash3"
]


def test_which_kernels_give_it() -> None:
    wanted = {"sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "split", "flash2", "flash3", "flash4"}
    wanted |= {name for name in BY_NAME if name.startswith("sage2_")}
    assert set(WITH_LSE) == wanted


def scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """The scaled and masked scores of (B, H, N, D) tensors, in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    found = q.double() @ k.double().mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is None:
        return found
    return found.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else found + mask.double()


def check_parts(kernel: Kernel, case: Case) -> None:
    """The log-sum-exp of a call, and the call made of two halves of its keys."""
    q, k, v, mask = tensors(case, kernel.layout)
    swap = kernel.layout is Layout.BNHD
    tokens = 1 if swap else 2
    run_lse = kernel.load_lse()
    out, lse = run_lse(q, k, v, mask=mask, scale=case.scale)
    plain = [t.transpose(1, 2) if swap else t for t in (q, k, v)]
    wanted = scores(plain[0], plain[1], mask, case.scale).logsumexp(-1)
    assert lse.dtype is torch.float32 and lse.shape == wanted.shape
    assert torch.allclose(lse.double(), wanted, rtol=2e-3, atol=2e-3)
    whole = kernel.load()(q, k, v, mask=mask, scale=case.scale)
    tolerance = max(kernel.tolerance[case.dtype], 1e-5)
    assert measure_errors(out.float(), whole.float()).l2 <= tolerance
    if case.m < 2 or mask is not None:
        return
    joined = total = None
    for some in (slice(0, case.m // 2), slice(case.m // 2, case.m)):
        part, lse = run_lse(
            q, *(t.narrow(tokens, some.start, some.stop - some.start) for t in (k, v)), scale=case.scale
        )
        part = (part.transpose(1, 2) if swap else part).double()
        lse = lse.double()[..., None]
        joined = part if joined is None else joined - torch.sigmoid(lse - total) * (joined - part)
        total = lse if total is None else torch.logaddexp(total, lse)
    reference = reference_attention(*plain, scale=case.scale)
    assert measure_errors(joined.float(), reference).l2 <= tolerance


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_parts_of_a_call_join_to_the_call(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, device = BY_NAME[name], "cpu" if not variant else "cuda:0"
    if variant:
        monkeypatch.setenv("ATTUNE_STANDIN_SM", "{}{}".format(*STANDINS[name][1]))
    with standins.installed(variant) if variant else nullcontext():
        machine = pretended(STANDINS[name][1]) if variant else read_machine()
        with collected() as each:
            for case in CASES:
                if not reasons_against(kernel, case.call(device), machine):
                    with each(case):
                        check_parts(kernel, case)


def test_a_row_whose_keys_are_all_hidden_weighs_nothing() -> None:
    q, k, v, _mask = tensors(Case(dtype=F32), Layout.BHND)
    mask = torch.ones(1, 1, 33, 33, dtype=torch.bool)
    mask[:, :, 5] = False
    out, lse = BY_NAME["split"].load_lse()(q, k, v, mask=mask)
    assert torch.equal(out[:, :, 5], torch.zeros_like(out[:, :, 5]))
    assert bool(lse[:, :, 5].eq(float("-inf")).all()) and bool(lse[:, :, :5].isfinite().all())


def test_a_build_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTUNE_STANDIN_SM", "90")
    q, k, v, _mask = tensors(Case(), Layout.BNHD)
    with standins.installed("flash3"), pytest.raises(RuntimeError, match="flash_attn_interface gives no log-sum-exp"):
        BY_NAME["flash3"].load_lse()(q, k, v)
