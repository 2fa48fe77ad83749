"""Is a forward healthy: what is seen, what it costs to see it, and how far a lossy call may be off."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_attune.attention.call import Layout, describe
from comfyui_attune.attention.check import Check
from comfyui_attune.attention.errors import make_inputs
from comfyui_attune.attention.guard import NOT_FINITE, Limit, Sample, Sampler, Watch, sample_error
from comfyui_attune.attention.kernel import Kernel, Needs
from comfyui_attune.attention.plan import Decision
from comfyui_attune.attention.reference import reference_attention
from comfyui_attune.attention.route import Route


def kernel(precision: str = "lossy") -> Kernel:
    tolerance = {torch.float32: 0.1}
    return Kernel("k", "", "", Layout.BHND, precision, tolerance, load=lambda: None, needs=Needs())


def route(q, k, v, limit=None, heads=4, mask=None, skip_reshape=True) -> Route:
    made = Route((Decision("k", "k", ""),), kernel())
    made.call = describe(q, k, v, heads, mask=mask, skip_reshape=skip_reshape)
    made.limit, made.guarded = limit, True
    made.skips = (skip_reshape, False)
    made.fit(made.call, q, k, v)
    return made


def flat(t):
    """(B, H, N, D) as the host's (B, N, H·D)."""
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], -1)


def figures(sums) -> tuple[float, float]:
    a, b, c, d = sums.tolist()
    return a / b, math.sqrt(c / d)


@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]),
    lengths=st.sampled_from([(5, 5), (200, 200), (150, 7), (1, 300)]),
    mask=st.sampled_from([None, "bool", "float", "rows", "heads", "dead row"]),
    scale=st.sampled_from([None, 0.3]),
    size=st.sampled_from([0.0, 0.02, 0.3]),
    few=st.booleans(),
)
def test_a_sample_measures_the_error_that_is_there(batch, heads, lengths, mask, scale, size, few):
    """Every query is of the same size of error here, so a sample has to find that size."""
    from comfyui_attune.attention import guard

    (h, hk), (n, m) = heads, lengths
    q, k, v = make_inputs(batch, h, n, m, 16, kv_heads=hk, seed=n + m)
    shapes = {"bool": (1, 1, n, m), "float": (batch, 1, 1, m), "rows": (batch, 1, n, m), "heads": (1, h, n, m)}
    tensor = None
    if mask == "dead row":
        tensor = torch.ones(1, 1, n, m, dtype=torch.bool)
        tensor[0, 0, 0] = False
    elif mask is not None:
        tensor = torch.randn(shapes[mask], generator=torch.Generator().manual_seed(1))
        if mask == "bool":
            tensor = tensor > -0.5
            tensor[..., 0] = True
    wide = (t.repeat_interleave(h // hk, 1) for t in (k, v))
    exact = reference_attention(q, *wide, mask=tensor, scale=scale)
    if mask == "dead row":
        exact[:, :, 0] = 7.0  # whatever a kernel makes of it
    out = exact * (1 + size)
    before = guard._SAMPLE_BYTES
    guard._SAMPLE_BYTES = 1 if few else before  # one head at a time, or all
    try:
        sums = sample_error(q, k, v, out, tensor, scale, torch.Generator().manual_seed(3))
    finally:
        guard._SAMPLE_BYTES = before
    if mask == "dead row" and n == 1:
        assert sums.tolist() == [0, 0, 0, 0]
    else:
        assert figures(sums) == pytest.approx((size, size), rel=1e-3, abs=2e-6)


def test_a_sample_takes_no_more_memory_than_it_says(monkeypatch):
    """Scores for one head at a time where all heads would be too much."""
    from comfyui_attune.attention import guard

    seen = []
    real = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda t, dim: seen.append(t.numel() * 4) or real(t, dim))
    q, k, v = make_inputs(1, 8, 512, 4096, 8)
    monkeypatch.setattr(guard, "_SAMPLE_BYTES", 8 << 20)
    sample_error(q, k, v, torch.zeros(1, 8, 512, 8), None, None, torch.Generator())
    assert len(seen) == 8 and max(seen) <= 8 << 20


def see(guard, value=None, limit=None, size=0.0, n=64):
    q, k, v = make_inputs(1, 4, n, n, 8, seed=n)
    out = flat(reference_attention(q, k, v)) * (1 + size)
    if value is not None:
        out[0, 3, 5] = value
    made = route(flat(q), flat(k), flat(v), limit, skip_reshape=False)
    return guard.see(made, flat(q), flat(k), flat(v), None, out), made


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_number_in_one_call_is_seen(value):
    watch = Watch(Sampler())
    for index in range(10):
        see(watch, value if index == 4 else None)
    assert not watch.read().finite
    healthy = Watch(Sampler())
    for _ in range(10):
        see(healthy)
    assert healthy.read(torch.ones(3)).good
    assert not healthy.read(torch.tensor([1.0, value])).finite  # the model's own output counts


def test_large_half_numbers_are_no_infinity():
    watch = Watch(Sampler())
    q = torch.zeros(1, 64, 32, dtype=torch.float16)
    made = route(q, q, q, skip_reshape=False)
    watch.see(made, q, q, q, None, torch.full((1, 64, 32), 60000.0, dtype=torch.float16))
    assert watch.read().finite


def test_nothing_seen_needs_no_reading():
    assert Watch(Sampler()).read(torch.tensor([math.nan])).good  # no kernel of ours took part


@pytest.mark.parametrize(("limit", "good"), [(Limit("l1", 0.05), False), (Limit("l2", 0.1), True), (None, True)])
def test_the_error_is_held_against_the_budget_or_the_kernels_own_word(limit, good):
    watch = Watch(Sampler())
    see(watch, limit=limit, size=0.06)
    health = watch.read()
    assert health.good is good and health.finite
    assert len(health.samples) == (limit is not None)
    if not good:
        assert health.samples[0].beyond == "was off by 0.06 (relative L1 against float32), allowed: 0.05"


def test_the_first_call_of_each_route_is_compared_and_later_one_now_and_then():
    sampler, per_forward = Sampler(), []
    q, k, v = (flat(t) for t in make_inputs(1, 4, 64, 64, 8))
    routes = [route(q, k, v, Limit("l2", 0.1), skip_reshape=False) for _ in range(6)]
    for _ in range(161):
        watch = Watch(sampler)
        for one in routes:
            watch.see(one, q, k, v, None, torch.zeros_like(q))
        per_forward.append([sample.route for sample in watch.read().samples])
    assert per_forward[0] == routes
    assert all(len(compared) <= 1 for compared in per_forward[1:])
    assert 8 < sum(map(len, per_forward[1:])) < 40  # an eighth of 160
    assert {one for compared in per_forward[1:] for one in compared} == set(routes)


def test_sampling_does_not_touch_the_seed():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    watch = Watch(Sampler())
    see(watch, limit=Limit("l1", 0.05))
    watch.read()
    assert torch.equal(torch.rand(3), wanted)


def test_a_sample_that_cannot_be_had_costs_nothing(monkeypatch):
    from comfyui_attune.attention import guard

    def fails(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(guard, "sample_error", fails)
    watch = Watch(Sampler())
    see(watch, limit=Limit("l1", 0.05), size=0.5)
    assert watch.read().good


def test_a_check_judges_at_once_and_does_not_blame_a_kernel_for_its_inputs():
    check = Check(Sampler())
    assert see(check)[0] is None
    finding, made = see(check, math.nan)
    assert (finding.kernel, finding.reason) == ("k", NOT_FINITE)
    assert str(finding.place) == "a block with no number (self attention, 64 × 64 tokens)"
    q, k, v = (flat(t) for t in make_inputs(1, 4, 64, 64, 8))
    q[0, 0, 0] = math.nan
    assert check.see(made, q, k, v, None, torch.full_like(q, math.nan)) is None
    assert "allowed: 0.05" in see(check, limit=Limit("l1", 0.05), size=0.5)[0].reason


def test_errors_against_nothing_say_nothing():
    q = torch.zeros(1, 8, 32)
    one = route(q, q, q, Limit("l1", 0.05), skip_reshape=False)
    assert Sample(one, math.nan, math.nan).beyond == ""
