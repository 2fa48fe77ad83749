"""The record of a run: steps, blocks, what was discarded, errors, times, and how small all of it stays."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_attune.attention.account import account, words
from comfyui_attune.attention.clock import Clock
from comfyui_attune.attention.history import Cell, History, step_of
from comfyui_attune.attention.machine import Machine
from comfyui_attune.attention.plan import Decision
from comfyui_attune.attention.policy import BlockRange, Policy, Rule
from comfyui_attune.attention.record import Record
from comfyui_attune.host import run_files
from comfyui_attune.host.runs import RunInfo, Runs
from comfyui_attune.measure.run_text import KIND, SCHEMA, read_run

WISH = Policy((Rule(("sage3",), source="7"),))
SIGMAS = [1.0, 0.9, 0.6, 0.0]


def trail(kernel, *refused, wish="sage3"):
    """How a plan came about that ended at `kernel`; `refused`: (kernel, reason) before it."""
    return (*(Decision(name, wish, "7", (reason,)) for name, reason in refused), Decision(kernel, wish, "7"))


def calls(kernel, blocks=2, kinds=("self", "cross"), *refused):
    return {(trail(kernel, *refused), block, kind): 1 for block in range(blocks) for kind in kinds}


def record(sigmas=SIGMAS, first_step=0) -> Record:
    made = Record(WISH)
    made.sigmas, made.first_step = sigmas, first_step
    return made


def steps_seen(made: Record) -> dict[int, int]:
    made.close()
    return {step.number: step.forwards for step in made.history.steps}


# Steps


@pytest.mark.parametrize(
    ("sigma", "step"),
    [(1.0, 0), (0.95, 0), (0.9, 1), (0.7, 1), (0.6, 2), (0.3, 2), (0.0, 2), (-1.0, 2), (1.4, 0)],
)
def test_a_forward_belongs_to_the_step_whose_noise_it_has(sigma, step):
    assert step_of(sigma, SIGMAS) == step
    assert step_of(1 - sigma, [1 - one for one in SIGMAS]) == step, "the same where the noise rises (unsampling)"


@given(st.lists(st.floats(2**-10, 80, width=32), min_size=2, max_size=30, unique=True), st.data())
def test_every_noise_level_of_a_schedule_begins_its_own_step(levels, data):
    sigmas = [*sorted(levels, reverse=True), 0.0]
    place = data.draw(st.integers(0, len(levels) - 1))
    made = record(sigmas, first_step=3)
    made.add(calls("split"), forwards=1, sigma=torch.tensor(sigmas[place], dtype=torch.float64))
    assert steps_seen(made) == {3 + place: 1}


def test_noise_levels_are_compared_in_float32_as_the_host_does():
    third = 1 / 3  # is another number in float32
    made = record([1.0, third, 0.0])
    made.add(calls("split"), forwards=1, sigma=torch.tensor(third, dtype=torch.float32))
    assert steps_seen(made) == {1: 1}


def test_several_forwards_of_a_step_are_one_step():
    made = record(first_step=10)
    for sigma in (1.0, 1.0, 0.97, 0.9, 0.75, 0.6):
        made.add(calls("split"), forwards=1, sigma=torch.tensor(sigma))
    assert steps_seen(made) == {10: 3, 11: 2, 12: 1}


def test_without_a_schedule_a_step_is_a_forward():
    made = record(sigmas=())
    for _ in range(3):
        made.add(calls("split"), forwards=1, sigma=torch.tensor(0.5))
    assert steps_seen(made) == {0: 1, 1: 1, 2: 1}


def test_the_noise_is_not_read_while_the_run_goes_on(monkeypatch):
    read = []
    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _name=name, _real=real: (read.append(_name), _real(self, *a))[1]
        )
    made = record()
    sigmas = [torch.tensor(one) for one in SIGMAS[:3]]
    for sigma in sigmas:
        made.add(calls("split"), forwards=1, sigma=sigma)
    made.event("demotion", "x")
    made.observed(), made.nodes()
    assert read == []
    made.close()
    assert read == ["tolist", "tolist"], "the run's schedule, and all forwards at once"


def test_noise_that_cannot_be_read_costs_no_run_and_no_record():
    made = record()
    made.add(calls("split"), forwards=1, sigma=torch.tensor(1.0))
    made.add(calls("split"), forwards=1, sigma=torch.empty((), device="meta"))
    made.add(calls("split"), forwards=1, sigma=torch.tensor(float("nan")))
    made.add(calls("split"), forwards=1, sigma=torch.tensor([0.5, 0.5]))  # none that a host should send
    assert sum(steps_seen(made).values()) == 4
    assert made.observed() == {"split": 16}


# What ran


def test_each_block_and_step_tells_its_kernels():
    made = record()
    made.add(calls("split"), forwards=1, sigma=torch.tensor(1.0))
    made.add({**calls("sdpa", 1), (trail("basic"), 1, "self"): 2}, forwards=1, sigma=torch.tensor(0.6))
    made.close()
    data = account(made)
    seen = {
        (step["step"], block, kind, kernel): count * times
        for step in data["steps"]
        for number, times in step["patterns"]
        for block, kind, kernel, count in data["patterns"][number]
    }
    assert seen == {
        **{(0, block, kind, "split"): 1 for block in (0, 1) for kind in ("self", "cross")},
        **{(2, 0, kind, "sdpa"): 1 for kind in ("self", "cross")},
        (2, 1, "self", "basic"): 2,
    }


def test_what_was_thrown_away_is_told_apart_from_what_went_into_the_picture():
    made = record()
    made.add(calls("sage3"), forwards=1, sigma=torch.tensor(1.0))
    made.add(calls("sage3"), sigma=torch.tensor(0.9), discarded=True)
    made.event("repeat", "a forward was repeated", reason="sage3 gave NaN or infinity")
    made.add(calls("host"), forwards=1, sigma=torch.tensor(0.9))
    made.close()
    data = account(made)
    assert made.observed() == data["observed"] == {"sage3": 4, "host": 4}
    assert made.nodes()["7"].observed == {"sage3": 4, "host": 4}
    assert (data["forwards"], data["repeated"]) == (2, 1)
    assert (data["kernels"]["sage3"]["calls"], data["kernels"]["sage3"]["discarded"]) == (4, 4)
    first, second = data["steps"]
    assert not first["discarded"] and second["forwards"] == 1
    ((kept, _),), ((lost, _),) = second["patterns"], second["discarded"]
    assert {row[2] for row in data["patterns"][kept]} == {"host"}
    assert {row[2] for row in data["patterns"][lost]} == {"sage3"}
    assert (data["events"][0]["step"], data["events"][0]["forward"]) == (1, 1)
    assert data["planned"] == {"sage3": 8}, "what was done again was planned like the rest"


@pytest.mark.parametrize("told", [True, False])
def test_requested_planned_and_observed_are_kept_apart(told):
    """`told`: the guard says that it demoted. A kernel that raises has a reason that says so by itself."""
    reason = "gave NaN or infinity" if told else "raised RuntimeError: no kernel image"
    made = record()
    made.add(calls("sage2_fp8_cuda", 1, ("self",), ("sage3", "package sageattn3 is not installed")), forwards=1)
    if told:
        made.event("demotion", "it broke", kernel="sage2_fp8_cuda", block=0, call_kind="self", reason=reason)
    refused = (("sage3", "package sageattn3 is not installed"), ("sage2_fp8_cuda", reason))
    made.add(calls("sdpa", 1, ("self",), *refused), forwards=1)
    made.close()
    data = account(made)
    assert data["requested"] == {"sage3": 2}
    assert data["planned"] == {"sage2_fp8_cuda": 2}
    assert data["observed"] == {"sage2_fp8_cuda": 1, "sdpa": 1}
    row = next(row for row in data["plans"] if row["observed"] == "sdpa")
    assert row["blocks"] == [[0, 0]] and row["kinds"] == ["self"]
    assert [one["reasons"] for one in row["refused"]] == [["package sageattn3 is not installed"], [reason]]


def test_the_happenings_of_a_run_have_a_count_and_a_first_time_and_are_bounded():
    made = record()
    made.add(calls("split"), forwards=1, sigma=torch.tensor(1.0))
    for _ in range(3):
        made.event("demotion", "it broke", kernel="sage3", block=3, call_kind="self", reason="gave NaN")
        made.add(calls("split"), forwards=1, sigma=torch.tensor(0.9))
    for number in range(600):
        made.event("fallback", f"text {number}")
    made.event("demotion", "it broke", kernel="sage3", block=3, call_kind="self", reason="gave NaN")
    made.close()
    data = account(made)
    first = {"kind": "demotion", "text": "it broke", "kernel": "sage3", "block": 3, "call_kind": "self"}
    assert data["events"][0] == {**first, "reason": "gave NaN", "count": 4, "forward": 1, "step": 1}
    assert len(data["events"]) == 500 and data["events_left_out"] == 101


def test_what_happens_in_a_forward_that_is_repeated_is_told_of_that_forward():
    made = record()
    for sigma in (1.0, 0.9):
        made.event("repeat", "a forward was repeated", reason=f"at {sigma}")
        made.add(calls("sage3"), sigma=torch.tensor(sigma), discarded=True)
        made.add(calls("host"), forwards=1, sigma=torch.tensor(sigma))
    made.close()
    assert [(event["reason"], event["step"]) for event in account(made)["events"]] == [("at 1.0", 0), ("at 0.9", 1)]


def test_errors_have_mean_and_largest_per_kernel_and_block():
    made = record()
    for l1, block in ((0.01, 0), (0.03, 0), (0.02, 1), (float("nan"), 1), (float("inf"), None)):
        made.sampled("sage3", l1, 2 * l1, block)
    made.sampled("kitchen_int8", float("nan"), 0.0, 0)
    made.add(calls("sage3"), forwards=1)
    made.close()
    kernels = account(made)["kernels"]
    error = kernels["sage3"]["error"]
    assert (error["samples"], error["unusable"]) == (3, 2)
    assert error["mean_l1"] == pytest.approx(0.02) and error["mean_l2"] == pytest.approx(0.04)
    assert (error["largest_l1"], error["largest_l2"]) == (0.03, 0.06)
    assert error["largest_l1_by_block"] == [[0, 0.03], [1, 0.02]]
    assert kernels["kitchen_int8"]["error"]["mean_l1"] is None
    json.dumps(account(made), allow_nan=False)


def test_a_run_that_was_cut_short_tells_what_was_seen_so_far():
    made = record()
    made.add(calls("split"), forwards=1, sigma=torch.tensor(1.0))
    made.add({(trail("split"), 0, "self"): 1}, sigma=torch.tensor(0.9))  # an interrupt: no forward ended
    made.close()
    made.close()
    data = account(made)
    assert data["observed"] == {"split": 5} and [step["forwards"] for step in data["steps"]] == [1, 1]


def test_threads_lose_nothing():
    made = record()

    def work():
        for _ in range(200):
            made.add(calls("split"), forwards=1, sigma=torch.tensor(1.0))
            made.event("fallback", "x")
            made.sampled("split", 0.1, 0.1, 0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps_seen(made) == {0: 800} and made.forwards == 800
    assert made.observed() == {"split": 3200} and made.errors["split"].calls == 800
    assert [seen.count for seen in made.happened().values()] == [800]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Rule(("auto",)), "auto"),
        (Rule(("sage3",), kind="self", blocks=BlockRange(2, 37)), "sage3 for self attention in blocks 2-37"),
        (Rule(("split",), 20, 80, min_tokens=4096), "split from 20 to 80 percent for 4,096 tokens or more"),
        (Rule(("flash3", "sdpa"), on_refusal="error"), "flash3 or sdpa or stop"),
        (
            Rule(("sdpa",), blocks=BlockRange(-2, -1), exact_only=True),
            "only exact kernels, at last sdpa in the last 2 blocks",
        ),
    ],
)
def test_a_rule_in_words(rule, said):
    assert words(rule) == said


# Size


def test_a_long_run_of_a_large_model_stays_small():
    made = record([1 - n / 1000 for n in range(1001)])
    early, late = calls("sage3", 100), calls("sdpa", 100)
    tracemalloc.start()
    try:
        for number in range(2000):
            made.add(early if number < 900 else late, forwards=1, sigma=torch.tensor(1 - number / 2000))
        made.close()
        text = json.dumps(account(made), separators=(",", ":"))
        size, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(made.history.patterns) == 2 and len(made.history.steps) == 1000
    assert made.observed() == {"sage3": 180_000, "sdpa": 220_000}
    assert size < 4e6 and len(text) < 150_000, (size, len(text))


def test_forwards_that_are_all_different_are_counted_without_filling_the_memory():
    history = History()
    for number in range(3000):
        history.add(number, {Cell(block, "self", f"k{number}"): 1 for block in range(50)}, None)
    history.close(())
    assert sum(len(pattern) for pattern in history.patterns) <= 100_000
    assert history.left_out + len(history.steps) == 3000 and history.left_out > 0


def test_a_record_that_never_ends_keeps_no_steps():
    made = record()
    made.endless = True
    made.add(calls("split"), forwards=1, sigma=torch.tensor(1.0))
    assert steps_seen(made) == {} and made.observed() == {"split": 4}


def test_plans_whose_reasons_hold_new_figures_each_time_do_not_pile_up():
    made = record()
    for number in range(6000):
        made.add({(trail("sdpa", ("sage3", f"needs {number} MiB")), 0, "self"): 1}, forwards=1)
    made.close()
    assert made.observed() == {"sdpa": 6000} and len(made.calls()) <= 5001
    data = account(made)
    assert len(data["plans"]) == 500 and data["plans_left_out"] == 4501


# Time


def test_the_clock_gives_each_kernel_its_share_on_the_cpu():
    clock, cpu = Clock(), torch.device("cpu")
    for kernel, work in (("slow", 40), ("fast", 1), ("slow", 40)):
        mark = clock.start(cpu)
        for _ in range(work):
            torch.ones(256, 256) @ torch.ones(256, 256)
        clock.stop(mark, kernel)
    made = record()
    made.clock = clock
    made.add(calls("slow"), forwards=1)
    made.close()
    kernels = account(made)["kernels"]
    assert kernels["slow"]["timed_calls"] == 2 and kernels["fast"]["timed_calls"] == 1
    assert kernels["slow"]["share"] > 0.8 and kernels["slow"]["share"] + kernels["fast"]["share"] == pytest.approx(1)


def test_the_clock_is_bounded_and_counts_what_it_left_out():
    clock, cpu = Clock(most=3), torch.device("cpu")
    for _ in range(5):
        clock.stop(clock.start(cpu), "split")
    clock.stop(clock.start(torch.device("meta")), "split")  # a device that cannot be timed
    assert clock.read()["split"].calls == 3 and clock.untimed == 3
    assert clock.read()["split"].calls == 3, "asked again"


class LostEvent:
    """A CUDA event on a device that breaks between two calls, as PyTorch tells it."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, _stream: object) -> None:
        pass

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_is_lost_costs_no_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", LostEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = Clock()
    clock.stop(clock.start(torch.device("cuda:0")), "flash3")
    assert clock.read() == {} and clock.untimed == 1
    made = record()
    made.clock = clock
    made.close()
    assert account(made)["timed"] is True


@pytest.mark.gpu
def test_the_clock_times_cuda_calls_by_events_and_waits_only_when_read():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    a @ a
    torch.cuda.synchronize()
    clock = Clock()
    for kernel, work in (("slow", 50), ("fast", 1)):
        mark = clock.start(device)
        for _ in range(work):
            a @ a
        clock.stop(mark, kernel)
    times = clock.read()
    assert times["slow"].seconds > 5 * times["fast"].seconds > 0 and clock.untimed == 0


# On disk


def a_run(runs: Runs | None = None, **about) -> RunInfo:
    made = record()
    made.add(calls("split"), forwards=1, sigma=torch.tensor(1.0))
    known = {"prompt_id": "p", "workflow_id": None, "client_id": None, "sampler_node": "3", "model": "WAN21"}
    run = (runs or Runs()).open(**{**known, "record": made, "node_types": {"7": "Sage3Switch"}, **about})
    run.status = "finished"
    run.close()
    return run


def test_a_run_is_kept_as_json_with_kind_and_schema(tmp_path):
    folder = tmp_path / "Größe 運" / "runs"
    run = a_run()
    run_files.save(run, Machine(torch="2.11"), folder)
    assert run.file is not None and run.file.parent == folder
    data = read_run(run.file)
    assert (data["kind"], data["schema"]) == (KIND, SCHEMA)
    assert data["status"] == "finished" and data["machine"]["torch"] == "2.11"
    assert data["machine"]["devices"][0]["name"] == "cpu"
    assert data["policy"][0]["words"] == "sage3" and data["policy"][0]["node"] == "7"
    assert data["stage"] == {"first_step": 0, "steps": 3, "steps_in_all": 0, "first_sigma": 1.0, "last_sigma": 0.0}
    assert [path.name for path in folder.iterdir()] == [run.file.name], "nothing half-written is left"


def test_the_newest_50_are_kept_and_other_files_left_alone(tmp_path):
    (tmp_path / "mine.json").write_text("{}", "utf-8")
    files: list[Path] = []
    for number in range(55):
        run = a_run(started=1_700_000_000 + number * 7.5)
        run_files.save(run, Machine(), tmp_path)
        files.append(run.file)
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != "mine.json")
    assert names == [path.name for path in files[5:]], "names sort by time"
    assert (tmp_path / "mine.json").exists()


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("", "utf-8")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            run = a_run()
            run_files.save(run, Machine(), tmp_path / "file" / "runs")
            assert run.file is None
    assert len(caplog.records) == 1 and "ATTUNE_HOME" in caplog.text


def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch, caplog):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    run_files.save(a_run(), Machine(), tmp_path)
    assert list(tmp_path.iterdir()) == [] and "No space left" in caplog.text


def test_the_summary_for_metadata_is_short():
    made = record()
    made.add(calls("sage3", 40), sigma=torch.tensor(1.0), discarded=True)
    made.add(calls("host", 40), forwards=1, sigma=torch.tensor(1.0))
    made.event("demotion", "x", kernel="sage3", reason="gave NaN")
    summary = a_run(record=made).summary()
    assert summary["observed"] == {"host": 80} and summary["requested"] == ["sage3"]
    assert summary["repeated_forwards"] == 1 and summary["demoted"] == ["sage3"]
    assert sys.getsizeof(json.dumps(summary)) < 500
