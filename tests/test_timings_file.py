"""What `auto` has measured, on disk: it comes back as it was, for the same machine, and garbage costs nothing."""

import json
from dataclasses import replace

import pytest

from comfyui_attune.attention.machine import CPU, Fetched, Machine
from comfyui_attune.attention.timings import Measured, Timings, Workload
from comfyui_attune.host.timings import fingerprint, load, save, store, tuning_wanted
from comfyui_attune.kernels import KERNELS

WORKLOAD = Workload("cpu", 1, 2, 2, 512, 512, 64, 64, "float32", "")
HERE = Machine((CPU,), torch="2.11.0", packages={"xformers": "0.0.35"})


def some():
    timings = Timings()
    timings.keep(WORKLOAD, "split", Measured(((0.25, 0.5), (0.125, 0.5)), 1e-7, 2e-7))
    timings.keep(WORKLOAD, "sdpa_math", Measured(reason="raised RuntimeError: no"))
    timings.must_compile(("sage1", "cpu", "float16", "64", "64", "", "1", "0", "0"))
    timings.allowance = -0.5
    return timings


def test_it_comes_back_as_it_was_for_this_machine_only(tmp_path):
    save(some(), tmp_path, "here")
    other, here = Timings(), Timings()
    load(other, tmp_path, "elsewhere")
    load(here, tmp_path, "here")
    assert not other.known and here.known == some().known and here.allowance == -0.5
    assert list(here.to_compile) == list(some().to_compile)
    before = (tmp_path / "timings.json").stat().st_mtime_ns
    save(here, tmp_path, "here")
    assert (tmp_path / "timings.json").stat().st_mtime_ns == before, "nothing has changed"


def test_what_is_kept_is_bounded_and_the_last_used_stay(tmp_path):
    timings = Timings()
    for tokens in range(600):
        timings.keep(WORKLOAD._replace(q_len=tokens), "split", Measured(reason="x"))
    save(timings, tmp_path, "here")
    found = store(tmp_path).read()["here"]["workloads"]
    assert len(found) == 500 and WORKLOAD._replace(q_len=599).key in found
    for number in range(25):
        save(some(), tmp_path, f"other {number}")
    state = store(tmp_path).read()
    assert len(state) == 20 and "here" not in state and "other 24" in state


def test_two_processes_keep_what_each_has_found_and_what_was_forgotten_stays_away(tmp_path):
    one, other = some(), Timings()
    other.keep(WORKLOAD._replace(q_len=64), "split", Measured(reason="x"))
    save(one, tmp_path, "here")
    save(other, tmp_path, "here")
    both = Timings()
    load(both, tmp_path, "here")
    assert len(both.known) == 2
    one.forget(WORKLOAD)
    save(one, tmp_path, "here")
    later = Timings()
    load(later, tmp_path, "here")
    assert list(later.known) == [WORKLOAD._replace(q_len=64).key]


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "2.12.0"},
        {"packages": {"xformers": "0.0.36"}},
        {"packages": {}},
        {"cuda": "13.0"},
        {"driver": "580.1"},
        {"triton": "3.6.0"},
        {"host_attention": "pytorch"},
        {"fetched": {"flash3": Fetched("folder")}},
        {"devices": (replace(CPU, title="another"),)},
    ],
)
def test_another_machine_or_version_measures_anew(change):
    assert fingerprint(replace(HERE, **change), KERNELS) != fingerprint(HERE, KERNELS)
    assert fingerprint(replace(HERE), KERNELS) == fingerprint(HERE, KERNELS)


def test_a_changed_kernel_from_elsewhere_measures_anew():
    changed = [replace(KERNELS[0], origin="extra.py 1234"), *KERNELS[1:]]
    assert fingerprint(HERE, changed) != fingerprint(HERE, KERNELS)


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state["here"]["workloads"].update(x=3),
        lambda state: state["here"].pop("allowance"),
        lambda state: state["here"].update(allowance=float("nan")),
        lambda state: state["here"]["workloads"][WORKLOAD.key]["split"].update(pairs=[[1.0]]),
        lambda state: state["here"]["workloads"][WORKLOAD.key]["split"].update(pairs=[[0.0, 1.0]]),
        lambda state: state["here"]["workloads"][WORKLOAD.key]["split"].update(pairs=[["x", 1.0]]),
        lambda state: state["here"].update(to_compile=[["a"], ["a", "b"]]),
        lambda state: state["here"].update(to_compile=[["a"]]),
        lambda state: state.update(here=[]),
    ],
)
def test_an_edited_file_is_set_aside(tmp_path, caplog, edit):
    save(some(), tmp_path, "here")
    data = json.loads((tmp_path / "timings.json").read_text("utf-8"))
    edit(data["state"])
    (tmp_path / "timings.json").write_text(json.dumps(data), "utf-8")
    timings = Timings()
    load(timings, tmp_path, "here")
    assert not timings.known
    assert "is not a file of this version" in caplog.text and (tmp_path / "timings.json.unreadable").exists()


@pytest.mark.parametrize(("value", "wanted"), [("", True), ("on", True), ("off", False), ("OFF ", False), ("0", False)])
def test_the_switch(monkeypatch, value, wanted):
    monkeypatch.setenv("ATTUNE_TUNE", value)
    assert tuning_wanted() is wanted
