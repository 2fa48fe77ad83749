"""Verdicts in a running host: what may be called, who waits for whom, and that prompts come first."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch

from comfyui_attune.attention.call import Layout, describe
from comfyui_attune.attention.kernel import Kernel, Needs
from comfyui_attune.attention.machine import CPU, Architecture, Device, Machine
from comfyui_attune.attention.plan import make_plan
from comfyui_attune.attention.policy import Rule
from comfyui_attune.doctor.kernel_verdict import KernelVerdict
from comfyui_attune.host import verdicts as module
from comfyui_attune.host.verdicts import OPEN, Verdicts

WORKS = KernelVerdict("works", error=0.0)
CRASHED = KernelVerdict("crashed", "ended that process with signal SIGSEGV")
GPU = Device("cuda:0", "a card", Architecture.ADA, (8, 9), 24 << 30)
TWIN = dataclasses.replace(GPU, name="cuda:1")
OTHER = Device("cuda:2", "another card", Architecture.AMPERE, (8, 0), 40 << 30)


def kernel(name: str, **more) -> Kernel:
    needs = Needs(devices=frozenset({"cuda", "cpu"}))
    exact = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
    return Kernel(name, name, "", Layout.BHND, "exact", exact, load=lambda: None, needs=needs, **more)


class Probe:
    """Stands in for doctor.probe: gives each kernel the verdicts of `outcomes` in turn, as hold() and told() ask."""

    def __init__(self, monkeypatch, outcomes: dict[str, list[KernelVerdict]], kept=None):
        self.outcomes, self.kept = outcomes, kept or {}
        self.tried: list[tuple[str, str]] = []
        self.gate = threading.Event()
        self.gate.set()
        monkeypatch.setattr(module, "stored", self.stored)
        monkeypatch.setattr(module, "examine", self.examine)

    def stored(self, kernels, machine, folder, device):
        names = [kernel.name for kernel in kernels]
        return {n: v for n, v in self.kept.items() if n in names}, {n: "key" for n in names if n not in self.kept}

    def examine(self, kernels, machine, pack, folder, device, *, told, hold):
        waiting, found = [kernel.name for kernel in kernels], {}
        while waiting:
            name = next((name for name in waiting if not hold(name)), None)
            if name is None or not self.gate.is_set():
                time.sleep(0.01)
                continue
            waiting.remove(name)
            self.tried.append((device.name, name))
            found[name] = self.outcomes[name].pop(0) if len(self.outcomes[name]) > 1 else self.outcomes[name][0]
            told(name, found[name])
        return found


@pytest.fixture
def make(tmp_path):
    made = []

    def one(*kernels: Kernel, busy=lambda: False, devices=(CPU,), machine=None) -> Verdicts:
        machine = machine or Machine(devices)
        made.append(Verdicts(kernels, lambda: machine, tmp_path, tmp_path, busy))
        return made[-1]

    yield one
    for verdicts in made:
        verdicts.stop()


def soon(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_only_what_works_may_be_called(make, monkeypatch):
    probe = Probe(monkeypatch, {"good": [WORKS], "bad": [CRASHED], "plain": [CRASHED]})
    probe.gate.clear()
    verdicts = make(kernel("good"), kernel("bad"), kernel("plain", needs_proof=False))
    assert verdicts.refused("cpu") == {"good": OPEN, "bad": OPEN}
    assert verdicts.condemned("cpu") == {}
    assert verdicts.outcomes() == dict.fromkeys(("good", "bad", "plain"), "open")
    verdicts.wait(["plain"], "cpu", check=lambda: pytest.fail("plain PyTorch need not be waited for"))
    probe.gate.set()
    assert soon(lambda: verdicts.open("cpu") == [])
    assert set(verdicts.refused("cpu")) == set(verdicts.condemned("cpu")) == {"bad", "plain"}
    assert "crashed (ended that process with signal SIGSEGV)" in verdicts.refused("cpu")["bad"]
    assert verdicts.outcomes() == {"good": "works", "bad": "crashed", "plain": "crashed"}


def test_what_is_kept_is_not_tried_again(make, monkeypatch):
    probe = Probe(monkeypatch, {"new": [WORKS]}, kept={"old": WORKS, "bad": CRASHED})
    verdicts = make(kernel("old"), kernel("bad"), kernel("new"))
    assert soon(lambda: verdicts.open("cpu") == [])
    assert [name for _, name in probe.tried] == ["new"]
    assert list(verdicts.refused("cpu")) == ["bad"]


def test_a_run_waits_for_the_kernel_it_names_and_says_so_while_the_others_wait_for_the_prompt(make, monkeypatch):
    probe = Probe(monkeypatch, {name: [WORKS] for name in ("a", "b", "c")})
    busy, said = [True], []
    verdicts = make(kernel("a"), kernel("b"), kernel("c"), busy=lambda: busy[0])
    verdicts.wait(["b"], "cpu", said.append)
    assert said == ["b"]
    assert [name for _, name in probe.tried] == ["b"]
    assert set(verdicts.refused("cpu")) == {"a", "c"}
    verdicts.wait(["b"], "cpu", said.append)
    assert said == ["b"]  # it is known now
    busy[0] = False
    assert soon(lambda: not verdicts.refused("cpu"))


def test_a_family_is_waited_for_until_one_works(make, monkeypatch):
    probe = Probe(monkeypatch, {"a": [CRASHED], "b": [WORKS], "c": [WORKS]})
    verdicts = make(kernel("a"), kernel("b"), kernel("c"), busy=lambda: True)
    verdicts.wait(["a", "b", "c", "host"], "cpu")
    assert [name for _, name in probe.tried] == ["a", "b"]


def test_a_report_waits_for_all_of_them(make, monkeypatch):
    Probe(monkeypatch, {"a": [WORKS], "b": [CRASHED], "c": [WORKS]})
    verdicts = make(kernel("a"), kernel("b"), kernel("c", needs_proof=False), busy=lambda: True)
    assert verdicts.settle("cpu") == {"a": WORKS, "b": CRASHED, "c": WORKS}


def test_a_wait_that_is_interrupted_ends(make, monkeypatch):
    class Interrupt(Exception):
        pass

    probe = Probe(monkeypatch, {"a": [WORKS]})
    probe.gate.clear()
    verdicts = make(kernel("a"), busy=lambda: True)

    def check():
        raise Interrupt

    with pytest.raises(Interrupt):
        verdicts.wait(["a"], "cpu", check=check)
    probe.gate.set()
    time.sleep(0.2)
    assert probe.tried == []  # nobody waits any more, and a prompt runs


def test_a_disturbed_probe_is_done_again_when_a_run_names_the_kernel(make, monkeypatch):
    disturbed = KernelVerdict("undecided", "memory was short")
    probe = Probe(monkeypatch, {"a": [disturbed, WORKS]})
    verdicts = make(kernel("a"))
    assert soon(lambda: verdicts.open("cpu") == [])
    assert "memory was short" in verdicts.refused("cpu")["a"]
    verdicts.wait(["a"], "cpu")
    assert verdicts.refused("cpu") == {}
    assert len(probe.tried) == 2


def test_a_run_on_a_second_card_comes_before_the_work_in_hand(make, monkeypatch):
    probe = Probe(monkeypatch, {"a": [WORKS], "b": [WORKS]})
    verdicts = make(kernel("a"), kernel("b"), busy=lambda: True, devices=(GPU, TWIN, OTHER, CPU))
    verdicts.wait(["b"], "cuda:2")
    assert probe.tried == [("cuda:2", "b")]
    verdicts.wait(["a"], "cuda:1")
    assert probe.tried[1:] == [("cuda:0", "a")]  # equal cards share their verdicts
    assert set(verdicts.refused("cuda:1")) == set(verdicts.refused("cuda:0")) == {"b"}
    assert set(verdicts.refused("cuda:2")) == {"a"}


def test_sessions_that_last_are_told_of_news(make, monkeypatch):
    class Session:
        asked = 0

        def ask_again(self):
            self.asked += 1

    probe = Probe(monkeypatch, {"a": [WORKS]})
    probe.gate.clear()
    verdicts, session = make(kernel("a")), Session()
    verdicts.tell(session)
    verdicts.known("cpu")
    before = session.asked
    probe.gate.set()
    assert soon(lambda: session.asked > before)


def test_a_probe_that_fails_as_a_whole_releases_whoever_waits(make, monkeypatch, caplog):
    Probe(monkeypatch, {})
    monkeypatch.setattr(module, "examine", lambda *_args, **_options: 1 / 0)
    verdicts = make(kernel("a"))
    verdicts.wait(["a"], "cpu")
    assert "undecided (the probe failed (ZeroDivisionError: division by zero))" in verdicts.refused("cpu")["a"]
    assert "are not used" in caplog.text
    assert verdicts._thread.is_alive()  # a full disk now need not be one later


def test_stopping_ends_what_is_under_way(make, monkeypatch):
    probe = Probe(monkeypatch, {"a": [WORKS]})
    probe.gate.clear()
    verdicts = make(kernel("a"))
    verdicts.known("cpu")
    verdicts.stop()
    assert not verdicts._thread.is_alive()
    verdicts.wait(["a"], "cpu")  # and nobody waits for ever


@pytest.mark.parametrize(("found", "refused"), [(CRASHED, True), (WORKS, False)])
def test_the_hosts_own_attention_is_judged_by_what_it_calls(make, monkeypatch, caplog, found, refused):
    """Started with --use-sage-attention, ComfyUI computes with that package wherever nobody says otherwise."""
    Probe(monkeypatch, {"sage1": [found], "sdpa": [WORKS]})
    machine = Machine((CPU,), host_attention="sage", host_flag="--use-sage-attention")
    verdicts = make(kernel("sage1"), kernel("sdpa"), machine=machine)
    assert soon(lambda: verdicts.open("cpu") == [])
    assert ("host" in verdicts.refused("cpu")) is refused
    assert soon(lambda: ("Start ComfyUI without --use-sage-attention." in caplog.text) is refused)
    call = describe(*(torch.zeros(1, 8, 64, dtype=torch.float16),) * 3, 2)
    kernels = {one.name: one for one in (kernel("sage1"), kernel("sdpa"))}
    plan = make_plan(call, [Rule(("host",))], kernels, machine, verdicts.refused("cpu"))
    assert plan.name == ("sdpa" if refused else "host")


def test_a_disturbed_probe_is_not_done_again_in_every_run(make, monkeypatch):
    probe = Probe(monkeypatch, {"a": [KernelVerdict("undecided", "the GPU is full")]})
    verdicts = make(kernel("a"))
    for _ in range(3):
        verdicts.wait(["a"], "cpu")
    assert len(probe.tried) == 2  # at start, and once for the first run that named it


def test_sessions_may_come_while_verdicts_come_in(make, monkeypatch):
    class Session:
        def ask_again(self):
            pass

    Probe(monkeypatch, {"a": [WORKS]})
    verdicts, kept, failed = make(kernel("a")), [], []

    def tell():
        try:
            for _ in range(3000):
                kept.append(Session())
                verdicts.tell(kept[-1])
                if len(kept) % 7 == 0:
                    kept.clear()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=tell)
    thread.start()
    while thread.is_alive():
        verdicts._keep(CPU, {"a": WORKS})
    thread.join()
    assert failed == []
