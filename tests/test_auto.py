"""`auto`, measured: kernels of known speed and error, timed by the real clock in real forwards."""

import itertools
import time
from dataclasses import replace

import pytest
import torch

from comfyui_attune.attention.call import Layout
from comfyui_attune.attention.healing import Snapshot, healed
from comfyui_attune.attention.kernel import Kernel, Needs
from comfyui_attune.attention.link import HostLink
from comfyui_attune.attention.machine import CPU, Machine
from comfyui_attune.attention.policy import BlockRange, Policy, Rule
from comfyui_attune.attention.router import Router
from comfyui_attune.attention.session import Session
from comfyui_attune.attention.timings import Measured, Timings, Workload, ranked, to_measure

SHAPE = (1, 2, 512, 64)  # 1.3e8 operations: just not tiny; half a millisecond
HOST_MS = 16.0  # far from the others' times: the machine may be busy


class Stopped(Exception):
    """The user's interrupt."""


class Standin:
    """A kernel that sleeps, then computes; `ms` may be a function of the number of the call."""

    def __init__(self, name, ms, precision="exact", error=0.0, fails_at=None, fault=None, workspace=0, triton=False):
        self.name, self.ms, self.error, self.fails_at, self.fault = name, ms, error, fails_at, fault or RuntimeError
        self.calls = 0
        needs = Needs(devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32}), triton=triton)
        self.kernel = Kernel(
            name, name, "", Layout.BHND, precision, {torch.float32: 2e-5}, lambda: self.run, needs,
            workspace_bytes=lambda call: workspace,
        )  # fmt: skip

    def run(self, q, k, v, *, mask=None, scale=None):
        number, self.calls = self.calls, self.calls + 1
        if self.fails_at is not None and number >= self.fails_at:
            raise self.fault("made to fail")
        time.sleep((self.ms(number) if callable(self.ms) else self.ms) / 1000)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if self.error:
            noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            out = out + noise * (self.error * out.norm() / noise.norm())
        return out


def host(q, k, v, heads, mask=None, *_args, **_options):
    time.sleep(HOST_MS / 1000)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class Bench:
    """Runs of a model of `blocks` attention calls in a forward, on stand-ins that `auto` may choose from."""

    def __init__(self, monkeypatch, *standins, wish="auto", blocks=2, timings=None, **rule):
        from comfyui_attune.attention import machine

        self.standins = {one.name: one for one in standins}
        names = tuple(self.standins)
        monkeypatch.setitem(machine._TABLE, machine.Architecture.CPU, (names, names))
        self.timings = Timings() if timings is None else timings
        self.spare = None
        link = HostLink(interrupts=(Stopped,), timings=self.timings, spare_bytes=lambda _device: self.spare)
        kernels = {one.name: one.kernel for one in standins}
        self.router = Router(Policy((Rule((wish,), source="1", **rule),)), kernels, Machine((CPU,), triton="3.6"), link)
        self.blocks = blocks
        generator = torch.Generator().manual_seed(1)
        self.tensors = [torch.randn(SHAPE, generator=generator) for _ in range(3)]

    def forward(self, session, tensors=None, sleep_ms=0.0):
        q, k, v = tensors or self.tensors

        def run():
            time.sleep(sleep_ms / 1000)
            for block in range(self.blocks):
                options = {"block_index": block}
                out = self.router(host, q, k, v, SHAPE[1], skip_reshape=True, transformer_options=options)
            return out

        return healed(self.router, session, self.router.policy.without_percent, True, run, Snapshot())

    def run(self, forwards=20, **others):
        """One sampling run; the session, and what computed each forward."""
        session, kernels = Session(self.router), []
        # Time enough for every timing: what the budget does has tests of its own.
        session.tuner._began = time.perf_counter() - 1000
        for _ in range(forwards):
            before = session.record.observed()
            self.forward(session, **others)
            kernels.append(set(session.record.observed() - before))
        session.tuner.close()
        return session, kernels


def test_the_fastest_is_chosen_at_a_boundary_once_and_from_the_beginning_of_the_next_run(monkeypatch):
    bench = Bench(monkeypatch, Standin("sage1", 40), Standin("sdpa_flash", 1), Standin("split", 8))
    session, kernels = bench.run()
    assert all(len(one) == 1 for one in kernels), "a forward is of one piece"
    changes = [(a, b) for a, b in itertools.pairwise(kernels) if a != b]
    assert changes == [({"host"}, {"sdpa_flash"})]
    assert kernels.index({"sdpa_flash"}) <= 11
    found = bench.timings.of(Workload.of(session_call(bench)))
    assert found["sage1"].ratio > 1.5 and found["sdpa_flash"].ratio < 0.5
    assert len(found["sage1"].pairs) == 2 and len(found["sdpa_flash"].pairs) == 3, "more where it decides"
    assert any("auto measured self attention of 512 × 512 tokens" in note for note in session.record.notes)
    calls = {name: one.calls for name, one in bench.standins.items()}
    _, kernels = bench.run(5)
    assert kernels == [{"sdpa_flash"}] * 5
    assert bench.standins["split"].calls == calls["split"] and bench.standins["sage1"].calls == calls["sage1"]


def session_call(bench):
    from comfyui_attune.attention.call import describe

    return describe(*bench.tensors, SHAPE[1], skip_reshape=True)


def test_the_host_stays_where_nothing_is_faster(monkeypatch):
    bench = Bench(monkeypatch, Standin("split", 40), Standin("sdpa_math", 30))
    session, kernels = bench.run(12)
    assert kernels == [{"host"}] * 12
    assert not session.tuner._trials or not any(trial.waiting for trial in session.tuner._trials.values())
    calls = sum(one.calls for one in bench.standins.values())
    bench.run(6)
    assert sum(one.calls for one in bench.standins.values()) == calls, "what is known is not measured again"


def test_the_fastest_that_is_wrong_is_not_chosen(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 0.2, error=0.01), Standin("split", 8))
    session, kernels = bench.run()
    assert kernels[-1] == {"split"}
    assert any("sdpa_flash was off by 0.0" in note for note in session.record.notes)
    assert bench.standins["sdpa_flash"].calls == 1, "wrong once is enough"


def test_nan_is_not_chosen(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 0.2, error=float("nan")), Standin("split", 8))
    _, kernels = bench.run()
    assert kernels[-1] == {"split"}


@pytest.mark.parametrize(("budget", "winner"), [(0.05, "split"), (0.2, "sage1")])
def test_lossy_kernels_only_within_the_budget(monkeypatch, budget, winner):
    sage = Standin("sage1", 0.2, "lossy", error=0.1)
    bench = Bench(monkeypatch, sage, Standin("split", 8), wish="auto_fast", error_budget=budget)
    _, kernels = bench.run()
    assert kernels[-1] == {winner}


def test_one_that_fails_at_its_third_call_is_not_chosen_or_given_up_for_good(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 0.2, fails_at=2), Standin("split", 8))
    session, kernels = bench.run()
    assert kernels[-1] == {"split"}
    assert any("sdpa_flash raised RuntimeError: made to fail" in note for note in session.record.notes)
    # Chosen, and failing only then: the run goes on, and no later one takes it.
    bench = Bench(monkeypatch, Standin("sdpa_flash", 0.2, fails_at=10), Standin("split", 8))
    session, kernels = bench.run()
    assert {"sdpa_flash"} in kernels and kernels[-1] == {"split"}
    _, kernels = bench.run()
    assert set().union(*kernels) <= {"host", "split"} and kernels[-1] == {"split"}


def test_one_that_turns_slow_while_it_is_measured_or_later(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", lambda number: 0.2 if number < 1 else 30), Standin("split", 8))
    _, kernels = bench.run()
    assert kernels[-1] == {"split"}
    slow = Standin("sdpa_flash", lambda number: 0.2 if number < 24 else 30)
    bench = Bench(monkeypatch, slow, Standin("split", 8))
    _, kernels = bench.run()
    assert kernels[-1] == {"sdpa_flash"}, "a run keeps its choice"
    session, kernels = bench.run(5)
    assert kernels == [{"sdpa_flash"}] * 5 and not session.record.notes, "once: the whole machine may have been slow"
    session, _ = bench.run(5)
    assert any("sdpa_flash took 3" in note and "the next run measures again" in note for note in session.record.notes)
    _, kernels = bench.run()
    assert kernels[-1] == {"split"}


def test_at_most_three_are_measured(monkeypatch):
    names = ("sage1", "sdpa_flash", "split", "sdpa_math", "sdpa_efficient")
    bench = Bench(monkeypatch, *(Standin(name, 20 - 3 * place) for place, name in enumerate(names)))
    bench.run(12)
    assert [name for name, one in bench.standins.items() if one.calls] == list(names[:3])


def test_one_timing_in_a_forward_at_most(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 5), Standin("split", 9), Standin("sage1", 9))
    session = Session(bench.router)
    session.tuner._began = time.perf_counter() - 1000
    counts = []
    while any(trial.waiting for trial in session.tuner._trials.values()) or not counts:
        before = sum(one.calls for one in bench.standins.values())
        bench.forward(session)
        counts.append(sum(one.calls for one in bench.standins.values()) - before)
    assert max(counts) == 1 and 3 <= sum(counts) <= 9


def test_measuring_takes_one_percent_of_the_time_so_far_and_goes_on_in_the_next_run(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 1), Standin("split", 10), blocks=2)
    session = Session(bench.router)
    for _ in range(20):  # 20 forwards of 20 ms: nothing fits into 4 ms
        bench.forward(session)
    assert sum(one.calls for one in bench.standins.values()) == 0 and session.tuner.spent == 0
    began = time.perf_counter()
    while not session.tuner.spent:
        bench.forward(session, sleep_ms=500)
    assert session.tuner.spent < 0.02 * (time.perf_counter() - began + 0.4)
    done = {name: len(one.pairs) for name, one in bench.timings.of(Workload.of(session_call(bench))).items()}
    assert done, "what was measured is kept"
    _, kernels = bench.run()
    assert kernels[-1] == {"sdpa_flash"} and kernels[0] == {"host"}


def test_an_interrupt_goes_through_and_what_was_measured_stays(monkeypatch):
    bench = Bench(monkeypatch, Standin("split", 8), Standin("sdpa_flash", 1, fails_at=0, fault=Stopped))
    with pytest.raises(Stopped):
        bench.run()
    assert "split" in bench.timings.of(Workload.of(session_call(bench)))
    assert "sdpa_flash" not in bench.timings.of(Workload.of(session_call(bench)))


def test_peak_memory_is_never_raised(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_math", 0.2, workspace=2**30), Standin("split", 8))
    bench.spare = 2**24  # room for an output of 256 KiB, and for comparing it
    session, kernels = bench.run()
    assert bench.standins["sdpa_math"].calls == 0 and kernels[-1] == {"split"}
    assert any("sdpa_math would raise the peak of memory: needs 1,024 MiB" in note for note in session.record.notes)
    bench.spare = 2**31
    _, kernels = bench.run(5)
    assert kernels == [{"split"}] * 5, "the choice is made"


def test_tiny_calls_are_the_hosts_and_short_and_long_ones_are_decided_apart(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 1))
    tiny = [tensor[:, :, :64] for tensor in bench.tensors]
    _, kernels = bench.run(10, tensors=tiny)
    assert kernels == [{"host"}] * 10 and not bench.timings.known
    crossed = [torch.randn(1, 2, 2048, 64), bench.tensors[1][:, :, :256], bench.tensors[2][:, :, :256]]
    bench.run(tensors=crossed)
    bench.run()
    assert len(bench.timings.known) == 2


def test_off_means_the_tables_first_choice_and_nothing_measured(monkeypatch):
    bench = Bench(monkeypatch, Standin("split", 9), Standin("sdpa_flash", 1))
    bench.router = Router(bench.router.policy, bench.router.kernels, bench.router.machine, HostLink())
    _, kernels = bench.run(6)
    assert kernels == [{"split"}] * 6 and bench.standins["sdpa_flash"].calls == 0


def test_what_has_to_be_compiled_waits_for_the_next_run(monkeypatch):
    from comfyui_attune.attention.prepare import prepare

    bench = Bench(monkeypatch, Standin("attune_int8", 0.2, triton=True), Standin("split", 8))
    session, _ = bench.run(12)
    assert bench.standins["attune_int8"].calls == 0
    assert any("attune_int8 has to be compiled" in note for note in session.record.notes)
    said = []
    prepare(bench.timings, bench.router.kernels, lambda name, device: True, said.append, lambda: None)
    assert said == ["compiling attune_int8, once"] and bench.standins["attune_int8"].calls == 1
    _, kernels = bench.run()
    assert kernels[-1] == {"attune_int8"}
    prepare(bench.timings, bench.router.kernels, lambda name, device: True, said.append, lambda: None)
    assert len(said) == 1


def test_a_forward_that_is_repeated_counts_for_nothing_and_measures_nothing(monkeypatch):
    bench = Bench(monkeypatch, Standin("split", 8), Standin("sdpa_flash", 1))
    broken = replace(bench.standins["split"].kernel, name="sage1", load=lambda: lambda q, k, v, **_: q * float("nan"))
    rules = (*bench.router.policy.rules, Rule(("sage1",), blocks=BlockRange(0, 0)))
    kernels = {**bench.router.kernels, "sage1": broken}
    bench.router = Router(Policy(rules), kernels, bench.router.machine, bench.router.link, blocks=2)
    session, kernels = bench.run()
    assert session.record.repeated == 1
    assert kernels[0] == {"host"} and kernels[-1] == {"sdpa_flash"}


@pytest.mark.parametrize("forwards", [1, 2])
def test_runs_of_few_forwards_measure_too(monkeypatch, forwards):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 1), Standin("split", 8))
    for _ in range(20):
        _, kernels = bench.run(forwards)
    assert kernels == [{"sdpa_flash"}] * forwards


def test_a_best_guess_that_comes_late_is_measured_whatever_else_was(monkeypatch):
    names = ("attune_int8", "sdpa_flash", "split", "sdpa_math")
    bench = Bench(monkeypatch, Standin(names[0], 0.2, triton=True), *(Standin(name, 8) for name in names[1:]))
    bench.run()
    assert set(bench.timings.of(Workload.of(session_call(bench)))) == set(names[1:])
    bench.timings.compiled.update(bench.timings.to_compile)
    _, kernels = bench.run()
    assert kernels[-1] == {"attune_int8"}


def test_a_shape_that_does_not_come_back_keeps_no_other_waiting(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 1))
    session = Session(bench.router)
    session.tuner._began = time.perf_counter() - 1000
    for _ in range(2):  # larger, so it comes first
        bench.forward(session, tensors=[torch.cat((tensor, tensor), 2) for tensor in bench.tensors])
    for _ in range(16):
        bench.forward(session)
    assert len(bench.timings.of(Workload.of(session_call(bench)))["sdpa_flash"].pairs) == 3


def test_a_choice_does_not_depend_on_the_memory_that_is_free_at_the_moment(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_math", 0.2, workspace=2**30), Standin("split", 8))
    free = [2**20]
    link = replace(bench.router.link, free_bytes=lambda _device: free[0], spare_bytes=lambda _device: 2**26)
    bench.router = Router(bench.router.policy, bench.router.kernels, bench.router.machine, link)
    bench.run()
    free[0] = 2**31
    _, kernels = bench.run(6)
    assert kernels == [{"split"}] * 6


def test_each_rule_has_its_own_budget(monkeypatch):
    bench = Bench(monkeypatch, Standin("sage1", 0.2, "lossy", error=0.1), Standin("split", 8))
    rules = (
        Rule(("auto_fast",), source="1", error_budget=0.2),
        Rule(("auto_fast",), source="2", error_budget=0.05, blocks=BlockRange(0, 0)),
    )
    bench.router = Router(Policy(rules), bench.router.kernels, bench.router.machine, bench.router.link, blocks=2)
    bench.run(30)
    session, kernels = bench.run(3)
    assert kernels == [{"sage1", "split"}] * 3 and session.record.repeated == 0


def test_what_was_saved_up_is_kept_for_other_shapes_and_an_overdraft_is_paid_back(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 1))
    bench.run()
    bench.timings.allowance = 5.0
    bench.forward(session := Session(bench.router))
    session.tuner.close()
    assert 4.9 < bench.timings.allowance <= 5.0
    bench.timings.allowance = -3.0
    bench.forward(session := Session(bench.router))
    session.tuner.close()
    assert -3.0 < bench.timings.allowance < -2.9


def test_tensors_whose_right_answer_is_zero_tell_nothing(monkeypatch):
    bench = Bench(monkeypatch, Standin("sdpa_flash", 0.2, error=0.01), Standin("split", 8))
    q, k, v = bench.tensors
    bench.run(8, tensors=[q, k, v * 0])
    assert not bench.timings.of(Workload.of(session_call(bench)))
    _, kernels = bench.run()
    assert kernels[-1] == {"split"}


def test_the_same_function_is_no_faster_than_itself(monkeypatch):
    """Neither side may find its tensors in a cache where the other does not."""
    bench = Bench(monkeypatch, Standin("split", HOST_MS), blocks=12)
    bench.run(6)
    found = bench.timings.of(Workload.of(session_call(bench)))["split"]
    assert 0.8 < found.ratio < 1.3


def test_to_measure_and_ranked():
    def found(*ratios):
        return Measured(tuple((ratio, 1.0) for ratio in ratios))

    names = ("a", "b", "c", "d")
    assert to_measure(names, names, {}) == ["a", "b", "c"]
    assert to_measure(names, names, {"a": found(0.5)}) == ["b", "c", "a"]
    three = found(0.5, 0.5, 0.5)
    assert to_measure(names, names, {"a": three, "b": found(0.9), "c": found(0.7, 0.9)}) == ["b", "c"]
    assert to_measure(names, names, {"a": three, "b": found(9, 0.9), "c": found(0.7, 9)}) == ["c"], "disturbed once"
    assert to_measure(names, names, {"a": Measured(reason="no"), "b": found(2, 2), "c": found(3, 3)}) == []
    found_two = {"a": found(2, 2), "b": found(2, 2)}
    assert to_measure(("c", "d"), names, found_two) == ["c"], "one that cannot run now counts"
    assert found(0.2, 9, 9).ratio == 9 and found(9, 0.2).ratio == 0.2 and Measured(reason="no").ratio == float("inf")
    known = {"a": found(0.99), "b": found(0.8), "c": found(0.5), "d": Measured(reason="x")}
    order = ranked((*names, "host"), known, 0.05, {})
    assert order == ("c", "b", "host", "a", "d")
