"""A forward whose kernel goes wrong: repeated, the culprit found; nothing is done where attention is not the cause."""

from __future__ import annotations

import math

import pytest
import torch

from comfyui_attune.attention.call import Layout
from comfyui_attune.attention.compiled import plain_attention
from comfyui_attune.attention.guard import Finding, Place
from comfyui_attune.attention.healing import Snapshot, healed
from comfyui_attune.attention.kernel import Kernel, Needs
from comfyui_attune.attention.link import HostLink
from comfyui_attune.attention.machine import Machine
from comfyui_attune.attention.policy import Policy, Rule
from comfyui_attune.attention.reference import reference_attention
from comfyui_attune.attention.router import Router
from comfyui_attune.attention.session import CURRENT, Session

HEADS = 2


class Faulty:
    """A kernel that computes the reference; `spoil(out, block)` gives what it returns. It is told its block."""

    def __init__(self, name="sage1", precision="lossy", spoil=lambda out, block: out):
        self.spoil, self.blocks = spoil, []
        self.kernel = Kernel(
            name, name, "", Layout.BHND, precision, {torch.float32: 0.1}, load=lambda: self.run,
            needs=Needs(devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32})),
        )  # fmt: skip

    def run(self, q, k, v, *, mask=None, scale=None):
        self.blocks.append(Model.block)
        return self.spoil(reference_attention(q, k, v, mask=mask, scale=scale), Model.block)


class Model:
    """Four blocks, each with self attention over 16 tokens and cross attention to 5; it pops `state`, as UNets do."""

    block = None

    def __init__(self, router, break_block=None):
        self.router, self.break_block = router, break_block
        torch.manual_seed(1)
        self.text = torch.randn(1, 5, HEADS * 8)

    def __call__(self, x, state):
        for block in range(4):
            Model.block = block
            options = {"block_index": block, "total_blocks": 4}
            for other in (x, self.text):
                x = x + self.router(plain_attention, x, other, other, HEADS, transformer_options=options)
            x = x + state.pop()
            if block == self.break_block:
                x = x * math.nan
        return x


def setup(*kernels: Faulty, rules=None, machine=None, link=None, **model):
    known = {one.kernel.name: one.kernel for one in kernels}
    rules = rules or [Rule(tuple(known), source="7")]
    router = Router(Policy(tuple(rules)), known, machine or Machine(), link or HostLink(), blocks=4)
    return router, Session(router), Model(router, **model)


def forward(router, session, model, seed=0):
    torch.manual_seed(seed)
    x, state = torch.randn(1, 16, HEADS * 8), [0.0, 1.0, 2.0, 3.0]
    active = router.policy.without_percent
    return healed(router, session, active, True, lambda: model(x, state), Snapshot([state]))


def exact(seed=0, **model):
    """The same forward on the host's own attention."""
    router, session, net = setup(rules=[Rule(("host",), source="7")], **model)
    return forward(router, session, net, seed)


def happened(session):
    return [(what.kind, what.kernel, what.block) for what in session.record.happened()]


def nan_in(*blocks):
    return lambda out, block: out * math.nan if block in blocks else out


def test_nan_in_one_block_is_healed_and_only_that_block_is_taken_away():
    kernel = Faulty(spoil=nan_in(2))
    router, session, model = setup(kernel)
    assert torch.equal(forward(router, session, model), exact())
    kernel.blocks.clear()
    out = forward(router, session, model, seed=1)
    assert torch.allclose(out, exact(1), atol=1e-5)
    assert kernel.blocks == [0, 0, 1, 1, 3, 3]
    record = session.record
    assert (record.forwards, record.repeated) == (2, 1)
    assert record.observed() == {"host": 8 + 2, "sage1": 6}
    assert happened(session) == [("repeat", "", None), ("demotion", "sage1", 2), ("demotion", "sage1", 2)]
    assert [(f.place.block, f.place.kind) for f in session.findings] == [(2, "self"), (2, "cross")]
    assert {seen.forward for seen in record.happened().values()} == {0}
    assert "sage1 gave NaN or infinity in block 2 (self attention, 16 × 16 tokens)" in record.notes[0]


def test_one_infinite_row_is_enough():
    def spoil(out, block):
        out[0, 1, 3] = math.inf if block == 3 else out[0, 1, 3]
        return out

    router, session, model = setup(Faulty(spoil=spoil))
    assert torch.equal(forward(router, session, model), exact())


def test_an_exact_kernel_that_is_not_plain_pytorch_is_watched_too():
    router, session, model = setup(Faulty("flash2", "exact", nan_in(0, 1, 2, 3)))
    assert torch.equal(forward(router, session, model), exact())


@pytest.mark.parametrize(
    ("size", "rule", "healthy"),
    [
        (0.01, Rule(("sage1",), source="7"), True),
        (0.06, Rule(("sage1",), source="7"), True),  # by its own word: 0.1
        (0.5, Rule(("sage1",), source="7"), False),
        (0.06, Rule(("auto_fast",), source="7"), False),  # by the budget: 0.05
        (0.06, Rule(("auto_fast",), source="7", error_budget=0.2), True),
    ],
)
def test_a_lossy_kernel_is_held_to_the_budget_or_to_its_own_word(monkeypatch, size, rule, healthy):
    from comfyui_attune.attention import plan

    monkeypatch.setattr(plan, "first_choices", lambda _architecture, fast: ("sage1",) if fast else ())
    kernel = Faulty(spoil=lambda out, _block: out * (1 + size))
    router, session, model = setup(kernel, rules=[rule])
    out = forward(router, session, model)
    assert torch.equal(out, exact()) is not healthy
    assert session.record.errors["sage1"].largest_l1 == pytest.approx(size, rel=1e-3)
    if not healthy:
        kernel.blocks.clear()
        forward(router, session, model)
        assert kernel.blocks == []
        assert session.record.repeated == 1


def test_a_budget_of_zero_means_exact_kernels(monkeypatch):
    from comfyui_attune.attention import plan

    choices = {True: ("sage1",), False: ("flash2",)}
    monkeypatch.setattr(plan, "first_choices", lambda _architecture, fast: choices[fast])
    rules = [Rule(("auto_fast",), error_budget=0.0, source="7")]
    router, session, model = setup(Faulty("flash2", "exact"), Faulty(), rules=rules)
    forward(router, session, model)
    assert session.record.observed() == {"flash2": 8}


def test_where_attention_is_not_the_cause_nothing_changes_and_it_is_said_once(caplog):
    kernel = Faulty()
    router, session, model = setup(kernel, break_block=1)
    for _ in range(3):
        assert forward(router, session, model).isnan().all()
    assert session.record.observed() == {"sage1": 24}
    assert session.record.repeated == 0 and session.findings == []
    assert happened(session) == [("not attention", "", None)]
    assert caplog.text.count("attention is not the cause") == 1
    assert len(kernel.blocks) == 24  # and no forward was repeated after the first


def test_nan_that_does_not_come_again_costs_the_kernel_its_place_the_second_time():
    calls = []

    def spoil(out, _block):
        calls.append(1)
        return out * math.nan if len(calls) in (3, 25) else out

    kernel = Faulty(spoil=spoil)
    router, session, model = setup(kernel)
    assert torch.equal(forward(router, session, model), exact())
    forward(router, session, model, 1)
    assert session.record.repeated == 1 and session.findings == []
    assert torch.equal(forward(router, session, model, 2), exact(2))
    kernel.blocks.clear()
    forward(router, session, model, 3)
    assert kernel.blocks == []
    assert [what.kind for what in session.record.happened() if what.kind != "repeat"] == ["fallback", "demotion"]


def test_the_next_kernel_takes_over_and_is_watched_as_well():
    first, second = Faulty("sage1", spoil=nan_in(1)), Faulty("flash2", "exact", nan_in(1, 2))
    router, session, model = setup(first, second)
    assert torch.equal(forward(router, session, model), exact())
    first.blocks.clear(), second.blocks.clear()
    assert torch.allclose(forward(router, session, model, 1), exact(1), atol=1e-5)
    assert first.blocks == [0, 0, 2, 2, 3, 3] and second.blocks == []
    assert {(f.kernel, f.place.block) for f in session.findings} == {("sage1", 1), ("flash2", 1)}


def test_what_an_earlier_run_found_holds_from_the_start():
    kernel = Faulty(spoil=nan_in(2))
    router, session, model = setup(kernel)
    forward(router, session, model)
    later = Session(router)
    for finding in session.findings:
        later.blame(finding, remembered=True)
    kernel.blocks.clear()
    forward(router, later, model)
    assert later.record.repeated == 0 and later.findings == []
    assert kernel.blocks == [0, 0, 1, 1, 3, 3]
    refused = {reasons for (_, reasons) in later.record.nodes()["7"].refused}
    assert refused == {
        (
            "gave NaN or infinity in an earlier run or stage of such a model ('Probe again' in ComfyUI's"
            " tab Attention gives it a new chance, or `attune cache clear --verdicts`)",
        )
    }


def test_a_finding_holds_for_its_shape_only():
    finding = Finding("sage1", Place(None, "self", 64, 64, 2, 8, "float32"), "x")
    kernel = Faulty()
    router, session, model = setup(kernel)
    session.blame(finding)
    forward(router, session, model)
    assert session.record.observed() == {"sage1": 8}


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("in_pass", [2, 3])
def test_an_interrupt_in_a_repeat_goes_through_and_the_record_stays_right(in_pass):
    passes = []

    class Stops(Model):
        def __call__(self, x, state):
            passes.append(1)
            if len(passes) == in_pass:
                raise Interrupt
            return super().__call__(x, state)

    router, session, _ = setup(Faulty(spoil=nan_in(0)), link=HostLink(interrupts=(Interrupt,)))
    with pytest.raises(Interrupt):
        forward(router, session, Stops(router))
    assert CURRENT.get() is None
    assert sum(count.kept + count.discarded for count in session.record.calls().values()) == (8 if in_pass == 2 else 16)


def test_a_failure_while_looking_for_the_culprit_does_not_cost_the_clean_result():
    passes = []

    class Fails(Model):
        def __call__(self, x, state):
            passes.append(1)
            if len(passes) == 3:
                raise MemoryError("out of memory")
            return super().__call__(x, state)

    router, session, _ = setup(Faulty(spoil=nan_in(0)))
    state = [0.0, 1.0, 2.0, 3.0]
    torch.manual_seed(0)
    x, net = torch.randn(1, 16, HEADS * 8), Fails(router)
    active = router.policy.without_percent
    assert torch.equal(healed(router, session, active, True, lambda: net(x, state), Snapshot([state])), exact())
    assert state == []  # as a forward leaves it


def test_a_repeat_that_fails_leaves_the_run_with_what_there_was():
    """The host's own attention may need more memory than there is."""
    passes = []

    class Fails(Model):
        def __call__(self, x, state):
            passes.append(1)
            if len(passes) == 2:
                state.pop()
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(x, state)

    router, session, _ = setup(Faulty(spoil=lambda out, _block: out * 1.5))
    state = [0.0, 1.0, 2.0, 3.0]
    out = healed(
        router, session, router.policy.without_percent, True,
        lambda: Fails(router)(torch.ones(1, 16, HEADS * 8), state), Snapshot([state]),
    )  # fmt: skip
    assert torch.isfinite(out).all() and state == []
    assert session.record.observed() == {"sage1": 8} and session.record.repeated == 0
    assert [kind for kind, _, _ in happened(session)].count("fallback") == 1
    assert "OutOfMemoryError: CUDA out of memory. Its first result was kept" in session.record.notes[-1]


@pytest.mark.parametrize("passes", [1, 3])
def test_the_search_for_the_culprit_counts_for_nothing(passes):
    """Also where it fails: one forward was asked for, and eight calls went into its result."""
    router, session, model = setup(Faulty(spoil=nan_in(1)))
    inner, seen = model.__call__, []

    def run(x, state):
        seen.append(1)
        if passes == 3 and len(seen) == 3:
            inner(x, state)
            raise MemoryError("out of memory")
        return inner(x, state)

    state = [0.0, 1.0, 2.0, 3.0]
    x = torch.ones(1, 16, HEADS * 8)
    healed(router, session, router.policy.without_percent, True, lambda: run(x, state), Snapshot([state]))
    assert session.record.forwards == 1
    assert session.record.observed() == {"host": 8}


def test_a_stop_in_the_repeat_leaves_the_reason_in_the_record():
    passes = []

    class Stops(Model):
        def __call__(self, x, state):
            passes.append(1)
            if len(passes) == 2:
                raise Interrupt
            return super().__call__(x, state)

    router, session, _ = setup(Faulty(spoil=nan_in(0)), link=HostLink(interrupts=(Interrupt,)))
    with pytest.raises(Interrupt):
        forward(router, session, Stops(router))
    assert happened(session) == [("repeat", "", None)]


READS = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__")


@pytest.fixture
def reads(monkeypatch):
    """Counts what would make the host wait for a GPU."""
    counted = []
    for name in READS:
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, real=real, name=name, **k: counted.append(name) or real(self, *a, **k)
        )
    return counted


def test_a_healthy_forward_is_read_once_and_one_on_plain_pytorch_never(reads):
    router, session, model = setup(Faulty())
    torch.manual_seed(0)
    x = torch.randn(1, 16, HEADS * 8)
    for _ in range(3):
        state = [0.0, 1.0, 2.0, 3.0]
        reads.clear()
        healed(
            router, session, router.policy.without_percent, True,
            lambda state=state: model(x, state), Snapshot([state]),
        )  # fmt: skip
        # `sample_error` draws the batch item on the CPU, which waits for nothing.
        assert [name for name in reads if name != "__int__"] == ["tolist"]
    plain, session, model = setup(rules=[Rule(("host",), source="7")])
    reads.clear()
    healed(plain, session, plain.policy.without_percent, True, lambda: model(x, [0.0] * 4), Snapshot())
    assert reads == []


def test_calls_outside_any_run_are_judged_in_bulk_after_the_first(reads):
    kernel = Faulty("flash2", "exact")
    router, _, _ = setup(kernel)
    q = torch.randn(1, 16, HEADS * 8)
    for _ in range(2 + 64):
        router(plain_attention, q, q, q, HEADS)
    assert reads.count("tolist") == 1
    assert len(reads) < 2 * 4 + 2
    kernel.spoil = lambda out, _block: out * math.nan
    for _ in range(64):
        router(plain_attention, q, q, q, HEADS)
    out = router(plain_attention, q, q, q, HEADS)
    assert torch.equal(out, plain_attention(q, q, q, HEADS))  # late, and for good


def test_a_host_that_is_another_packages_kernel_is_watched_and_sdpa_takes_its_place():
    """ComfyUI started with --use-sage-attention: the node says host, and host gives NaN."""

    def broken(q, k, v, heads, *_args, **_options):
        return q * math.nan

    sdpa = Faulty("sdpa", "exact")
    router, session, model = setup(sdpa, rules=[Rule(("host",), source="7")], machine=Machine(host_attention="sage"))
    inner = router.__call__
    model.router = lambda _func, *args, **options: inner(broken, *args, **options)
    assert torch.allclose(forward(router, session, model), exact(), atol=1e-5)
    assert torch.allclose(forward(router, session, model, 1), exact(1), atol=1e-5)
    assert session.record.observed() == {"sdpa": 16}


def test_calls_outside_any_forward_are_judged_one_by_one():
    kernel = Faulty(spoil=lambda out, _block: out * math.nan)
    router, _, _ = setup(kernel)
    q = torch.randn(1, 16, HEADS * 8)
    out = router(plain_attention, q, q, q, HEADS)
    assert torch.equal(out, plain_attention(q, q, q, HEADS))
    router(plain_attention, q, q, q, HEADS)
    assert len(kernel.blocks) == 1


# What a forward consumes


def test_a_snapshot_puts_back_what_was_consumed_in_place():
    inner, tensor = [1, 2, 3], torch.zeros(2)
    cache = {"end": 5, "k": tensor}
    options = {"ar_state": {"kv_caches": [cache]}, "set": {1}, "tuple": ({"a": 1},)}
    control = {"input": inner, "output": []}
    options["itself"] = options
    snapshot = Snapshot((control, options), {"more": [control]})
    inner.pop(), control["output"].append(7), cache.update(end=9), options["set"].clear()
    options["tuple"][0]["a"], options["new"] = 2, 3
    tensor += 1
    snapshot.restore()
    assert control == {"input": [1, 2, 3], "output": []} and control["input"] is inner
    assert cache == {"end": 5, "k": tensor} and options["ar_state"]["kv_caches"][0] is cache
    assert options["set"] == {1} and options["tuple"] == ({"a": 1},) and "new" not in options
    assert tensor.tolist() == [1, 1]  # tensors are the forward's own business
    inner.clear()
    snapshot.restore()
    assert inner == [1, 2, 3]  # more than once
