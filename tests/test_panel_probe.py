"""Kernels tried again: what holds meanwhile, in which order, and what the panel is told of it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error

import pytest
import torch

from comfyui_attune.attention import guard
from comfyui_attune.attention.call import Layout
from comfyui_attune.attention.kernel import Kernel, Needs
from comfyui_attune.attention.machine import CPU, Machine, read_machine
from comfyui_attune.doctor.kernel_verdict import KernelVerdict
from comfyui_attune.doctor.probe import store
from comfyui_attune.host import again
from comfyui_attune.host import verdicts as module
from comfyui_attune.host.again import AlreadyTryingError, RepeatableVerdicts
from comfyui_attune.host.remembered import failed, recall, remember
from comfyui_attune.host.remembered import store as failures
from comfyui_attune.kernels import KERNELS
from support.prompts import selector, two_stage

WORKS, BROKEN = KernelVerdict("works", error=0.0), KernelVerdict("crashed", "ended")


def kernel(name: str) -> Kernel:
    needs = Needs(devices=frozenset({"cpu"}))
    return Kernel(name, name, "", Layout.BHND, "exact", {torch.float32: 1e-5}, load=lambda: None, needs=needs)


class Probe:
    """Stands in for doctor.probe: every kernel has been proved before, and is found to be `now` when tried again."""

    def __init__(self, monkeypatch, folder, names, now=WORKS):
        self.file, self.now, self.tried, self.fail = store(folder), now, [], False
        self.gate = threading.Event()
        self.gate.set()
        self.file.update(lambda state: state.update({name: {"key": WORKS} for name in names}))
        monkeypatch.setattr(module, "stored", self.stored)
        monkeypatch.setattr(module, "examine", self.examine)

    def stored(self, kernels, machine, folder, device):
        known = self.file.read()
        names = [kernel.name for kernel in kernels]
        return {n: known[n]["key"] for n in names if n in known}, {n: "key" for n in names if n not in known}

    def examine(self, kernels, machine, pack, folder, device, *, told, hold):
        known, open_ones = self.stored(kernels, machine, folder, device)
        if self.fail:
            raise OSError("no space left")
        while open_ones:
            name = next((name for name in open_ones if not hold(name)), None)
            if name is None or not self.gate.is_set():
                time.sleep(0.01)
                continue
            del open_ones[name]
            self.tried.append(name)
            self.file.update(lambda state, name=name: state.update({name: {"key": self.now}}))
            told(name, self.now)
            known[name] = self.now
        return known


@pytest.fixture
def make(tmp_path, monkeypatch):
    made = []

    def one(*names, busy=lambda: False, now=WORKS):
        probe = Probe(monkeypatch, tmp_path, names, now)
        verdicts = RepeatableVerdicts([kernel(n) for n in names], lambda: Machine((CPU,)), tmp_path, tmp_path, busy)
        made.append(verdicts)
        return verdicts, probe

    yield one
    for verdicts in made:
        verdicts.stop()


def soon(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_each_is_tried_once_told_once_and_kept(make):
    verdicts, probe = make("a", "b", "c", now=BROKEN)
    assert verdicts.outcomes() == dict.fromkeys("abc", "works") and probe.tried == []
    told = []
    verdicts.try_again(["c", "a"], lambda *news: told.append(news))
    assert soon(lambda: len(told) == 3)
    assert told == [("", "", 0, 2), ("c", "crashed", 1, 2), ("a", "crashed", 2, 2)]
    assert probe.tried == ["c", "a"]
    assert verdicts.outcomes() == {"a": "crashed", "b": "works", "c": "crashed"}
    assert {name: one["key"].outcome for name, one in probe.file.read().items()} == verdicts.outcomes()
    assert soon(lambda: verdicts.progress() == {"running": False, "waiting": False, "done": 0, "total": 0})


def test_what_was_known_holds_until_the_new_verdict_is_there(make):
    verdicts, probe = make("a", "b", now=BROKEN)
    probe.gate.clear()
    verdicts.try_again(["a", "b"], lambda *_: None)
    assert verdicts.refused("cpu") == {} and verdicts.outcomes() == {"a": "works", "b": "works"}
    verdicts.wait(["a"], "cpu", say=lambda name: pytest.fail(f"a run waits for {name}"))
    probe.gate.set()
    assert soon(lambda: set(verdicts.condemned("cpu")) == {"a", "b"})


def test_a_second_wish_is_refused_while_one_is_at_work(make):
    verdicts, probe = make("a", "b")
    probe.gate.clear()
    verdicts.try_again(["a"], lambda *_: None)
    with pytest.raises(AlreadyTryingError):
        verdicts.try_again(["b"], lambda *_: None)
    assert verdicts.progress() == {"running": True, "waiting": False, "done": 0, "total": 1}
    probe.gate.set()
    assert soon(lambda: not verdicts.progress()["running"])
    verdicts.try_again(["b"], lambda *_: None)
    assert soon(lambda: probe.tried == ["a", "b"])


def test_prompts_come_first(make):
    busy = [True]
    verdicts, probe = make("a", busy=lambda: busy[0])
    verdicts.try_again(["a"], lambda *_: None)
    time.sleep(0.2)
    assert probe.tried == [] and verdicts.progress()["waiting"] is True
    busy[0] = False
    assert soon(lambda: probe.tried == ["a"])


def failure(name: str) -> guard.Finding:
    return guard.Finding(name, guard.Place(1, "self", 64, 64, 2, 64, "float16"), "gave NaN")


def test_one_that_works_gets_a_new_chance_in_models_where_it_failed(make, tmp_path):
    verdicts, probe = make("a", "b", "c")
    here, known = Machine((CPU,)), {name: kernel(name) for name in "abc"}
    for model in ("one", "two"):
        remember(tmp_path, model, [failure("a"), failure("b")], known, here)
    remember(tmp_path, "three", [failure("a")], known, here)
    remember(tmp_path, "one", [failure("c")], known, Machine((CPU,), torch="1.0"))
    elsewhere = failures(tmp_path).read()["one"][-1]
    probe.now = BROKEN
    verdicts.try_again(["a"], lambda *_: None)
    assert soon(lambda: probe.tried == ["a"] and not verdicts.progress()["running"])
    assert failed(tmp_path, known, here) == {"a": ("gave NaN", 3), "b": ("gave NaN", 2)}
    probe.now, told = WORKS, []
    verdicts.try_again(["a", "c"], lambda *news: told.append((*news, failed(tmp_path, known, here))))
    assert soon(lambda: len(told) == 3)
    assert told[1] == ("a", "works", 1, 2, {"b": ("gave NaN", 2)}), "before anybody is told"
    assert recall(tmp_path, "one", known, here) == [failure("b")] and recall(tmp_path, "three", known, here) == []
    left = failures(tmp_path).read()
    assert set(left) == {"one", "two"} and left["one"][-1] == elsewhere, "what holds elsewhere was not tried here"


def test_what_cannot_be_forgotten_costs_no_verdict(make, monkeypatch, caplog):
    verdicts, _ = make("a")
    monkeypatch.setattr(again, "forget", lambda *_: 1 / 0)
    told = []
    verdicts.try_again(["a"], lambda *news: told.append(news))
    assert soon(lambda: len(told) == 2) and told[-1] == ("a", "works", 1, 1)
    assert "what was remembered against a could not be forgotten" in caplog.text


def test_where_the_probe_itself_fails_it_ends_and_nothing_is_believed(make):
    verdicts, probe = make("a", "b")
    verdicts.outcomes()
    probe.fail = True
    told = []
    verdicts.try_again(["a"], lambda *news: told.append(news))
    assert soon(lambda: len(told) == 2)
    assert told[-1] == ("a", "undecided", 1, 1) and not verdicts.progress()["running"]
    assert verdicts.outcomes() == {"a": "undecided", "b": "works"}


# In a real ComfyUI


def refused(server, data) -> int:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post("/attune/probe", data)
    with error.value as answer:
        assert json.loads(answer.read())["error"]
    return answer.code


def verdict(server, name):
    (row,) = (row for row in server.get("/attune/kernels")["kernels"] if row["name"] == name)
    return row["outcome"]


def done(server) -> bool:
    return not server.get("/attune/probe")["running"]


def test_the_button_tries_kernels_in_children_and_never_while_a_prompt_runs(make_server, tmp_path):
    server = make_server(env={"ATTUNE_HOME": str(tmp_path)}, folder="again")
    try:
        file = tmp_path / "verdicts.json"
        deadline = time.monotonic() + 120
        while any(row["outcome"] == "open" for row in server.get("/attune/kernels")["kernels"]):
            assert time.monotonic() < deadline
            time.sleep(0.3)
        assert done(server)
        own, here = {one.name: one for one in KERNELS}, read_machine(gpus=False)
        remember(tmp_path, "model", [failure("sdpa_math"), failure("split"), failure("basic")], own, here)
        remarks = server.get("/attune/machine")["remarks"]
        (remark,) = (one for one in remarks if one.startswith("sdpa_math: gave NaN in 1 model sampled here"))
        assert "'Probe again' in the sidebar tab Attention, if it works then, or `attune cache clear" in remark
        assert not any("Probe again" in one for one in remarks if one.startswith("basic: ")), "nobody probes it"
        said = len(server.output())
        (before,) = json.loads(file.read_text("utf-8"))["state"]["sdpa_math"].values()
        assert server.post("/attune/probe", {"kernels": ["sdpa_math", "flash2", "sdpa_math"]}) == {
            "started": True, "total": 2,
        }  # fmt: skip
        assert refused(server, {}) == 409
        assert verdict(server, "sdpa_math") == "works", "the old verdict holds"
        assert "sdpa_math" not in json.loads(file.read_text("utf-8"))["state"]
        prompt = two_stage(lambda p, m, stage: selector(p, m, str(20 + stage), "sdpa_math"), steps=4000)
        for key in ("12", "13"):
            prompt[key]["inputs"] |= {"start_at_step": 0, "end_at_step": 4000}
        identity = server.submit(prompt)
        while not any(run["forwards"] for run in server.runs(identity)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        state = server.get("/attune/probe")
        assert state["running"] and state["waiting"] and state["done"] == 1, "the prompt came before the child was done"
        assert refused(server, {"kernels": ["sdpa"]}) == 409
        server.interrupt()
        (run,) = server.wait(identity).runs
        assert run["status"] == "stopped" and set(run["observed"]) == {"sdpa_math"}
        assert not any("waiting" in note for note in run["notes"])
        deadline = time.monotonic() + 120
        while not done(server):
            assert time.monotonic() < deadline
            time.sleep(0.3)
        (after,) = json.loads(file.read_text("utf-8"))["state"]["sdpa_math"].values()
        assert after["outcome"] == "works" and after["milliseconds"] != before["milliseconds"]
        left = [one.partition(":")[0] for one in server.get("/attune/machine")["remarks"] if "gave NaN" in one]
        assert left == ["split", "basic"], "what was tried and works is given a new chance, and nothing else"
        assert "Traceback" not in server.output()[said:]
    finally:
        server.stop()
