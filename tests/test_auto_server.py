"""`auto` in a real ComfyUI, without stand-ins: it measures this CPU's kernels and keeps its choice."""

import json
import statistics

import pytest
import torch

from support import prompts

KERNELS = {"sdpa_flash", "sdpa_math", "split"}  # the host's own attention on a CPU is sub_quad: the fourth


@pytest.fixture(scope="module")
def auto(make_server, tmp_path_factory):
    """(server, folder of its state); ComfyUI with nothing measured yet."""
    home = tmp_path_factory.mktemp("measured")
    server = make_server(env={"ATTUNE_HOME": str(home)}, folder="auto")
    yield server, home
    server.stop()


def long(number, kernel="auto", steps=12):
    """A prompt of 2 × 6 forwards on 576 tokens; with another number the host runs all of it again."""

    def patch(prompt, model, stage):
        return prompts.selector(prompt, model, str(1000 + 2 * number + stage), kernel)

    return prompts.two_stage(patch, steps=steps, size=384, length=1)


def all_measured(home):
    """What is on disk of the one machine that this is, by workload."""
    (machine,) = json.loads((home / "timings.json").read_text("utf-8"))["state"].values()
    return machine["workloads"]


def measured(home):
    """The same of the self attention."""
    (found,) = [one for key, one in all_measured(home).items() if " x 576 x 576 x 128 float32" in key]
    return found


def share(one):
    return statistics.median(own / host for own, host in one["pairs"])


def notes(result):
    return [note for run in result.runs for note in run["notes"]]


def test_this_cpus_kernels_are_measured_and_the_choice_stays(auto):
    server, home = auto
    server.run(prompts.two_stage(lambda p, m, s: prompts.selector(p, m, str(900 + s), "sdpa_flash"), steps=2))  # proved
    told, number = [], 0
    while not told and number < 40:  # one percent of two blocks' time is little: it takes some runs
        told = [
            note for note in notes(server.run(long(number))) if note.startswith("auto measured self attention of 576")
        ]
        number += 1
    found = measured(home)
    assert told and set(found) == KERNELS
    assert list(all_measured(home)) == [key for key in all_measured(home) if " x 576 x 576 x " in key], (
        "tiny ones are not"
    )
    assert all(one["reason"] == "" and 0 < one["l2"] < 2e-5 for one in found.values())
    for one in found.values():
        assert 1 <= len(one["pairs"]) <= 3 and all(0 < seconds < 10 for pair in one["pairs"] for seconds in pair)
    first, second = (server.run(long(number + one)) for one in (1, 2))
    assert torch.equal(prompts.latent(first), prompts.latent(second)), "same seed, same bits"
    ran = [run["observed"] for run in first.runs]
    assert ran == [run["observed"] for run in second.runs]
    fastest = {min(one, key=lambda name: share(one[name])) for one in all_measured(home).values()}
    assert all(set(one) <= {*fastest, "host"} for one in ran)
    assert not [note for note in notes(second) if note.startswith("auto measured")], "nothing is measured twice"
    kept = (home / "timings.json").read_text("utf-8")
    server.run(long(number + 3, kernel="sdpa"))
    assert (home / "timings.json").read_text("utf-8") == kept, "a kernel that is named needs no measuring"


def test_what_was_measured_outlives_the_process(auto, make_server):
    _, home = auto
    kept = all_measured(home)
    assert kept
    other = make_server(env={"ATTUNE_HOME": str(home)}, folder="later")
    try:
        assert not [note for note in notes(other.run(long(0))) if note.startswith("auto measured")]
        assert all_measured(home) == kept
    finally:
        other.stop()


def test_tuning_can_be_switched_off(make_server, tmp_path):
    server = make_server(env={"ATTUNE_HOME": str(tmp_path), "ATTUNE_TUNE": "off"}, folder="off")
    try:
        result = server.run(long(0))
        assert [set(run["observed"]) for run in result.runs] == [{"sdpa"}, {"sdpa"}]
        assert not (tmp_path / "timings.json").exists()
    finally:
        server.stop()
