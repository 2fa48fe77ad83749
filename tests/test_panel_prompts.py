"""The prompt that ran last, and what the panel says where no run belongs to it."""

from __future__ import annotations

import time

import pytest

from support.panel import Fake, listed, live, past
from support.prompts import node, rule, selector, two_stage
from support.server import PromptFailedError
from support.workflows import BYPASSED, SELECTORS

SEEDS = iter(range(9000, 9999))


def sampling(kernel: str = "", steps: int = 2, **inputs):
    """A prompt that nothing of is cached; without `kernel` it has no node of the pack."""

    def patch(prompt, model, stage):
        return selector(prompt, model, str(20 + stage), kernel, **inputs) if kernel else model

    prompt = two_stage(patch, steps=steps)
    for key in ("12", "13"):
        prompt[key]["inputs"]["noise_seed"] = next(SEEDS)
    return prompt


def told(server) -> dict | None:
    return server.get("/attune/last-prompt")["prompt"]


def test_a_prompt_with_runs_and_the_same_out_of_the_cache(server):
    prompt = sampling("split")
    done = server.run(prompt)
    assert told(server) == {
        "prompt_id": done.prompt_id, "state": "finished", "nodes": 2, "runs": [run["run"] for run in done.runs],
        "cached": False, "default": "",
    }  # fmt: skip
    assert len(done.runs) == 2
    again = server.run(prompt)
    assert again.runs == [] and again.cached == set(prompt)
    assert told(server) == {**told(server), "prompt_id": again.prompt_id, "nodes": 2, "runs": [], "cached": True}
    prompt["14"]["inputs"]["filename_prefix"] = "tests/another"  # saved anew, not sampled anew
    server.run(prompt)
    assert (told(server)["nodes"], told(server)["runs"], told(server)["cached"]) == (2, [], False)


def test_a_prompt_without_a_node_and_one_whose_nodes_are_off(server):
    server.run(sampling("split"))
    plain = server.run(sampling())
    assert told(server) == {
        "prompt_id": plain.prompt_id, "state": "finished", "nodes": 0, "runs": [], "cached": False, "default": "",
    }  # fmt: skip
    server.run(sampling("disabled"))
    assert (told(server)["nodes"], told(server)["runs"]) == (2, [])
    empty = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    server.run({"1": empty, "2": node("SaveLatent", samples=["1", 0], filename_prefix=f"tests/{next(SEEDS)}")})
    assert (told(server)["nodes"], told(server)["state"]) == (0, "finished"), "it never samples"


def test_a_prompt_that_fails_before_it_samples(server):
    prompt = sampling()
    prompt["10"]["inputs"]["model"] = rule(prompt, prompt["10"]["inputs"]["model"], "30", "split", blocks="900")
    with pytest.raises(PromptFailedError):
        server.run(prompt)
    assert (told(server)["state"], told(server)["nodes"], told(server)["runs"]) == ("failed", 1, [])


def test_the_prompt_that_runs_comes_first_and_one_that_is_stopped(server):
    prompt = sampling(steps=4000)
    identity = server.submit(prompt)
    deadline = time.monotonic() + 60
    while (told(server) or {}).get("prompt_id") != identity:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (told(server)["state"], told(server)["nodes"], told(server)["runs"]) == ("running", 0, [])
    time.sleep(0.3)
    server.interrupt()
    server.wait(identity)
    assert (told(server)["prompt_id"], told(server)["state"]) == (identity, "stopped")


def test_the_panels_benchmarks_do_not_count_and_a_gap_in_the_history_is_no_answer(server):
    before = server.run(sampling())
    empty = node("EmptyLatentImage", width=64, height=64, batch_size=next(SEEDS) % 7 + 1)
    server.run({"attune_benchmark": empty, "2": node("SaveLatent", samples=["attune_benchmark", 0],
                                                     filename_prefix=f"tests/{next(SEEDS)}")})  # fmt: skip
    assert told(server)["prompt_id"] == before.prompt_id
    done = server.run(sampling("split"))
    server.post("/history", {"delete": [done.prompt_id]})
    assert told(server) is None, "the newest run is of a prompt that the history does not have any more"
    server.post("/history", {"clear": True})
    assert told(server) is None


# On the page


WITHOUT = "The last prompt ran without an attention node of ComfyUI-Attune, so nothing of it was recorded"


@pytest.mark.parametrize("desk_page", [False], ids=["canvas"], indirect=True)  # nothing of it is the renderer's
def test_a_run_of_a_prompt_before_is_not_shown_as_if_it_were_this_one(panel, desk):
    desk.open("wan2.2_t2v_14b")
    panel.open()
    panel.width(420)
    section = panel.section("live")
    number = desk.run().runs[-1]["run"]
    section.get_by_text("This was the last run.").wait_for()
    section.get_by_text(f"Run {number} · ").wait_for()
    again = sampling("split")
    number = desk.server.run(again).runs[-1]["run"]  # of another page
    section.get_by_text(f"Run {number} · ").wait_for()
    below = f"Shown below: run {number}."
    desk.server.run(again)
    section.get_by_text("The last prompt sampled nothing: ComfyUI had all of it in its cache. " + below).wait_for()
    desk.comfy.call("() => app.extensionManager.command.execute('Attune.BypassAll')")
    assert [desk.mode(one) for one in SELECTORS] == [BYPASSED] * 2
    desk.run()
    said = section.get_by_text(
        f"{WITHOUT}: whatever it sampled, ComfyUI itself or another pack computed the attention."
    )
    said.wait_for()
    assert said.inner_text().endswith(below) and said.get_attribute("role") == "status"
    for theme in ("light", "dark"):
        panel.theme(theme)
        desk.screenshot(f"panel-without-{theme}")
    desk.server.run(sampling("split"))
    section.get_by_text("This was the last run.").wait_for()
    desk.server.run(sampling())
    section.get_by_text(WITHOUT).wait_for()
    panel.close()
    desk.reload()
    panel.open()
    section.get_by_text(WITHOUT).wait_for()
    desk.comfy.call("() => app.extensionManager.command.execute('Attune.EnableAll')")
    desk.open("wan2.2_t2v_14b")
    number = desk.run().runs[-1]["run"]
    section.get_by_text(f"Run {number} · ").wait_for()
    section.get_by_text("This was the last run.").wait_for()


STATES = [
    ({"state": "running", "nodes": 0}, "The prompt that runs has no active attention node of ComfyUI-Attune"),
    ({"state": "running", "nodes": 2}, "This was the last run."),
    ({"state": "finished", "nodes": 0, "default": "sage"}, "was to run on sage, the default of the environment."),
    ({"state": "finished", "nodes": 2}, "the nodes are switched off, or they have no sampler"),
    ({"state": "failed", "nodes": 1}, "The last prompt failed before anything was sampled"),
    ({"state": "stopped", "nodes": 1}, "The last prompt was stopped before anything was sampled"),
    ({"state": "stopped", "nodes": 1, "runs": [7]}, "This was the last run."),
    (None, "This was the last run."),
]


@pytest.mark.parametrize("desk_page", [False], ids=["canvas"], indirect=True)
def test_what_is_said_of_each_prompt(panel, desk):
    fake = Fake(desk.comfy)
    try:
        fake.answers["/attune/runs"] = {"runs": [listed(7)]}
        fake.answers["/attune/runs/7"] = past(7, 44.9)
        fake.answers["/attune/last-prompt"] = {"prompt": None}
        panel.open()
        section = panel.section("live")
        section.get_by_text("Run 7 · ").wait_for()
        common = {"prompt_id": "p", "runs": [], "cached": False, "default": ""}
        for state, wanted in STATES:
            fake.answers["/attune/last-prompt"] = {"prompt": state and {**common, **state}}
            fake.send("status", {"exec_info": {"queue_remaining": 0}})
            section.get_by_text(wanted).wait_for()
        fake.answers["/attune/last-prompt"] = {"prompt": {**common, "state": "running", "nodes": 0}}
        fake.send("attune.live", {**live(4, full=True), "run": 8})
        section.get_by_text("Run 8 · ").wait_for()
        fake.send("status", {"exec_info": {"queue_remaining": 0}})
        desk.page.wait_for_timeout(400)
        assert "The prompt that runs" not in section.inner_text(), "what is being sampled is there to see"
    finally:
        desk.page.unroute("**/api/attune/**")
