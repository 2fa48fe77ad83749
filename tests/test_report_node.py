"""The node AttentionReport in a real ComfyUI, and what saved pictures tell of the runs behind them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from comfyui_attune.measure.run_cells import step_cells
from support.loading import ROOT
from support.prompts import latent, node, rule, selector, two_stage


def reported(kernel="split", key="40", behind="13", seed=5, **inputs):
    """A two-stage prompt with a selector on both stages and a report behind the second one."""
    prompt = two_stage(lambda p, m, stage: selector(p, m, str(20 + stage), kernel))
    prompt["12"]["inputs"]["noise_seed"] = seed
    prompt[key] = node("AttentionReport", value=[behind, 0], **inputs)
    prompt["14"]["inputs"]["samples"] = [key, 0]
    return prompt


def text_of(result, key="40") -> str:
    (text,) = result.outputs[key]["text"]
    return text


def test_its_face_in_the_node_library(server):
    info = server.object_info()["AttentionReport"]
    assert info["category"] == "attention" and info["output_node"] and len(info["description"]) > 40
    assert info["output_name"] == ["value", "text", "picture", "json_path"]
    assert info["output"][1:] == ["STRING", "IMAGE", "STRING"]
    assert list(info["input"]["required"]) == ["value"] and list(info["input"]["optional"]) == ["model"]


def test_a_report_tells_both_stages_and_passes_the_latent_through(server):
    prompt = reported(seed=31, kernel="host")
    without = two_stage()
    without["12"]["inputs"]["noise_seed"] = 31
    clean = latent(server.run(without))
    prompt["41"] = node("SaveImage", images=["40", 2], filename_prefix="tests/report")
    prompt["42"] = node("PreviewAny", source=["40", 3])
    result = server.run(prompt)
    assert torch.equal(latent(result), clean)
    text = text_of(result)
    assert "1. WAN21" in text and "2. WAN21" in text and "sampler node 12" in text and "sampler node 13" in text
    assert text.count("Ran: host ×8") == 2
    files = [Path(line) for line in result.outputs["42"]["text"][0].splitlines()]
    runs = [json.loads(file.read_text("utf-8")) for file in files]
    assert [run["sampler_node"] for run in runs] == ["12", "13"]
    assert {run["prompt_id"] for run in runs} == {result.prompt_id}
    assert all(run["observed"] == {"host": 8} and run["status"] == "finished" for run in runs)
    (saved,) = (file for file in result.files if file.suffix == ".png")
    with Image.open(saved) as image:
        assert image.mode == "RGB" and image.size[0] >= 1200


def test_each_step_and_block_of_both_stages_tells_the_kernel_that_the_rules_gave_it(server):
    """Shift 8, 8 steps: noise levels 1, .98, .96, .93 | .89, .83, .73, .53; percent 30 is .949."""

    def patch(prompt, model, stage):
        model = selector(prompt, model, str(20 + stage), "split")
        return rule(prompt, model, str(30 + stage), "basic", kind="cross", to_percent=30.0, blocks="1")

    prompt = two_stage(patch, steps=8)
    prompt["40"] = node("AttentionReport", value=["13", 0])
    prompt["42"] = node("PreviewAny", source=["40", 3])
    seen = {}
    for line in server.run(prompt).outputs["42"]["text"][0].splitlines():
        for step, cells in step_cells(json.loads(Path(line).read_text("utf-8"))).items():
            for (block, kind), kernels in cells.items():
                seen[step, block, kind] = list(kernels)
    assert seen == {
        (step, block, kind): ["basic" if step < 3 and block == 1 and kind == "cross" else "split"]
        for step in range(8)
        for block in (0, 1)
        for kind in ("self", "cross")
    }


def test_calls_are_timed_where_the_selector_asks_for_it(server):
    prompt = reported(seed=43)
    for key in ("20", "21"):
        prompt[key]["inputs"] |= {"time_calls": True, "cross_attention": "basic"}
    text = text_of(server.run(prompt))
    assert "Time was not measured" not in text
    shares = [int(share) for share in re.findall(r"^  (?:split|basic) .*?(\d+) %", text, re.MULTILINE)]
    assert len(shares) == 4 and 99 <= sum(shares[:2]) <= 101 and 99 <= sum(shares[2:]) <= 101, text


def test_any_type_goes_through_and_without_a_run_it_says_so(server):
    prompt = {
        "1": node("EmptyImage", width=16, height=8, batch_size=3, color=255),
        "2": node("AttentionReport", value=["1", 0]),
        "3": node("SaveImage", images=["2", 0], filename_prefix="tests/through"),
        "4": node("AttentionReport", value=["2", 1]),  # a text
    }
    result = server.run(prompt)
    assert "There is no run to report" in text_of(result, "2") and "There is no run" in text_of(result, "4")
    assert len([file for file in result.files if file.suffix == ".png"]) == 3
    with Image.open(result.files[0]) as image:
        assert image.size == (16, 8)
    assert result.outputs["2"]["images"], "the picture says it too"


def test_a_model_without_a_node_of_the_pack_says_so(server):
    prompt = reported(seed=32, model=["1", 0])
    assert "has no attention node of this pack" in text_of(server.run(prompt))


def test_with_the_model_only_its_runs_are_told(server):
    prompt = reported(seed=33, model=["21", 0])
    text = text_of(server.run(prompt))
    assert "sampler node 13" in text and "sampler node 12" not in text


def test_two_samplers_in_one_prompt_are_told_apart(server):
    """Two independent chains; each report tells of its own, whichever ran first."""
    prompt = reported(seed=34, behind="12")
    prompt["13"]["inputs"]["latent_image"] = ["7", 0]
    prompt["20"]["inputs"]["kernel"], prompt["21"]["inputs"]["kernel"] = "split", "basic"
    prompt["50"] = node("AttentionReport", value=["13", 0])
    result = server.run(prompt)
    first, second = text_of(result), text_of(result, "50")
    assert "sampler node 12" in first and "split ×8" in first and "basic" not in first
    assert "sampler node 13" in second and "basic ×8" in second and "split" not in second


def test_one_model_sampled_twice_and_prompt_after_prompt_never_mixes_up(server):
    prompt = reported(seed=35)
    prompt["11"]["inputs"]["model"] = ["20", 0]  # both samplers on the same patched model
    first = server.run(prompt)
    prompt["12"]["inputs"]["noise_seed"] = 36
    second = server.run(prompt)
    for result in (first, second):
        text = text_of(result)
        assert text.count("WAN21,") == 2 and text.count("Ran: split ×8") == 2
        assert "(node 21)" not in text


def test_a_cached_sampler_is_told_by_the_run_that_its_result_came_from(server):
    prompt = reported(seed=37)
    report = prompt.pop("40")
    prompt["14"]["inputs"]["samples"] = ["13", 0]
    server.run(prompt)
    prompt["40"] = report
    prompt["14"]["inputs"]["samples"] = ["40", 0]
    result = server.run(prompt)
    assert {"12", "13"} <= result.cached and result.runs == []
    text = text_of(result)
    assert "ComfyUI took the sampler's result from its cache" in text
    assert "sampler node 12 (in an earlier prompt" in text and "sampler node 13 (in an earlier prompt" in text
    again = server.run({**prompt, "99": node("PreviewAny", source=["40", 1])})
    assert again.outputs["99"]["text"] == [text], "and the report itself is cached with it"


def test_a_half_cached_prompt_tells_both_and_which_is_which(server):
    prompt = reported(seed=38)
    server.run(prompt)
    prompt["13"]["inputs"]["cfg"] = 2.0
    result = server.run(prompt)
    assert "12" in result.cached and [run["sampler_node"] for run in result.runs] == ["13"]
    one, two = text_of(result).split("\n\n")
    assert "sampler node 12 (in an earlier prompt" in one
    assert "sampler node 13" in two and "earlier" not in two


def test_a_batch_is_one_run(server):
    prompt = reported(seed=39)
    prompt["7"]["inputs"]["batch_size"] = 2
    assert text_of(server.run(prompt)).count("WAN21,") == 2


def test_attune_off_passes_the_value_through_and_says_so(make_server):
    off = make_server(env={"ATTUNE": "off"})
    try:
        result = off.run(reported(seed=40), workflow_ui={"nodes": []})
        assert "ATTUNE=off" in text_of(result) and latent(result).shape[0] == 1
    finally:
        off.stop()


def test_a_run_that_is_stopped_is_kept_with_what_was_seen(server):
    prompt = reported(seed=41)
    for key in ("12", "13"):
        prompt[key]["inputs"]["steps"] = 4000
        prompt[key]["inputs"]["start_at_step"], prompt[key]["inputs"]["end_at_step"] = 0, 4000
    prompt["42"] = node("PreviewAny", source=["40", 3])
    identity = server.submit(prompt)
    deadline = time.monotonic() + 120
    while not any(run["forwards"] for run in server.runs(identity)) and time.monotonic() < deadline:
        time.sleep(0.05)
    server.interrupt()
    server.wait(identity)
    (run,) = server.runs(identity)
    assert run["status"] == "stopped" and run["observed"]["split"] > 0
    # The next prompt that reports tells where the files are.
    other = reported(seed=42)
    other["42"] = node("PreviewAny", source=["40", 3])
    folder = Path(server.run(other).outputs["42"]["text"][0].splitlines()[0]).parent
    kept = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    (mine,) = (one for one in kept if one["prompt_id"] == identity)
    assert mine["status"] == "stopped" and mine["observed"] == run["observed"] and mine["steps"]


CONNECT = """() => {
  const [latent, report, decode, image, save] = [
    "EmptyLatentImage", "AttentionReport", "VAEDecode", "AttentionReport", "SaveImage",
  ].map((type) => { const made = LiteGraph.createNode(type); app.graph.add(made); return made; });
  latent.connect(0, report, 0);
  report.connect(0, decode, 0);
  decode.connect(0, image, 0);
  image.connect(0, save, 0);
  return [report.outputs[0].type, image.outputs[0].type, ...[report, decode, image, save].map((n) => n.inputs[0].link)];
}"""


def test_in_the_browser_it_stands_between_any_two_nodes(open_page):
    page = open_page()
    page.call("() => app.graph.clear()")
    latent_out, image_out, *links = page.call(CONNECT)
    assert (latent_out, image_out) == ("LATENT", "IMAGE"), "the output has the type of what comes in"
    assert all(link is not None for link in links)
    assert page.problems == []


# Metadata


def saving(seed, kernel="split"):
    """A prompt that samples, and then saves a picture."""
    prompt = reported(seed=seed, kernel=kernel)
    prompt["41"] = node("SaveImage", images=["40", 2], filename_prefix="tests/signed")
    return prompt


def chunks(result) -> dict[str, str]:
    (saved,) = (file for file in result.files if file.suffix == ".png")
    with Image.open(saved) as image:
        return dict(image.text)


WORKFLOW = {"id": "11111111-2222-3333-4444-555555555555", "nodes": [], "extra": {"note": "mine"}}


def test_a_saved_picture_says_what_ran_and_its_workflow_still_loads(server):
    prompt = saving(50)
    written = chunks(server.run(prompt, workflow_ui=WORKFLOW))
    assert json.loads(written["workflow"]) == WORKFLOW and json.loads(written["prompt"]) == prompt
    told = json.loads(written["attune"])
    assert [run["sampler_node"] for run in told["runs"]] == ["12", "13"]
    assert all(run["observed"] == {"split": 8} and run["status"] == "finished" for run in told["runs"])
    again = json.loads(written["prompt"])
    again["12"]["inputs"]["noise_seed"] = 51
    assert server.run(again, workflow_ui=json.loads(written["workflow"])).runs


def test_two_prompts_do_not_share_their_metadata(server):
    first = server.submit(saving(52, "split"), workflow_ui=WORKFLOW)
    second = server.submit(saving(53, "basic"), workflow_ui=WORKFLOW)
    plain = {
        "1": node("EmptyImage", width=16, height=8, batch_size=1, color=255),
        "2": node("SaveImage", images=["1", 0], filename_prefix="tests/plain"),
    }
    third = server.submit(plain, workflow_ui=WORKFLOW)
    for identity, kernel in ((first, "split"), (second, "basic")):
        told = json.loads(chunks(server.wait(identity))["attune"])
        assert [run["observed"] for run in told["runs"]] == [{kernel: 8}] * 2
    assert "attune" not in chunks(server.wait(third)), "nothing was sampled"


def test_a_prompt_without_metadata_stays_without(server):
    """Nodes of other packs ask whether there is any, and then expect a workflow in it."""
    written = chunks(server.run(saving(54)))
    assert set(written) == {"prompt"}


def test_with_disable_metadata_nothing_is_written(make_server):
    quiet = make_server("--disable-metadata")
    try:
        assert chunks(quiet.run(saving(55), workflow_ui=WORKFLOW)) == {}
    finally:
        quiet.stop()


def test_the_command_reads_what_the_server_wrote(server):
    prompt = reported(seed=56)
    prompt["42"] = node("PreviewAny", source=["40", 3])
    result = server.run(prompt)
    folder = Path(result.outputs["42"]["text"][0].splitlines()[0]).parent
    environment = {**os.environ, "ATTUNE_HOME": str(folder.parent), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(ROOT), "report", "--last"]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == text_of(result)
