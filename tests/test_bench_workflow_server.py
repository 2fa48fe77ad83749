"""`attune bench --workflow` on a real ComfyUI with the tiny models."""

from __future__ import annotations

import csv
import importlib.util
import json
import time
from pathlib import Path

import pytest

from comfyui_attune import cli
from comfyui_attune.measure import bench_command
from comfyui_attune.measure.workflow_convert import to_api
from comfyui_attune.measure.workflow_graph import SELECTOR, prepare
from comfyui_attune.measure.workflow_result import TOTAL
from support.prompts import node, picture, two_stage
from support.workflows import ACTIVE, BYPASSED, NAMES, OURS, STEPS, read, set_mode

TEMPLATES = "comfyui_workflow_templates_json"


def sent(prompt: dict) -> dict:
    return {key: (data["class_type"], data["inputs"]) for key, data in prompt.items()}


@pytest.fixture
def bench(server, tmp_path):
    """bench(workflow, "--frames", "5"): exit status and CSV rows of `attune bench` on the session's server."""

    def run(workflow: dict, *options: str) -> tuple[int, list[dict[str, str]]]:
        path, table = tmp_path / "é flow.json", tmp_path / "é rows.csv"
        path.write_text(json.dumps(workflow), "utf-8")
        status = cli.main(["bench", "--workflow", str(path), "--server", server.url, "--csv", str(table), *options])
        rows = list(csv.DictReader(table.read_text("utf-8").splitlines())) if table.exists() else []
        return status, rows

    return run


def whole(rows: list[dict[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["kernel"], row["frames"]): row for row in rows if row["stage"] == TOTAL}


def decoded(length: int = 5, **more) -> dict:
    """The two-stage prompt with its samples decoded and saved as pictures."""
    prompt = two_stage(length=length)
    prompt["20"] = node("VAELoader", vae_name="wan_2.1_vae.safetensors")
    prompt["21"] = node("VAEDecode", samples=["13", 0], vae=["20", 0])
    prompt["14"] = node("SaveImage", images=["21", 0], filename_prefix="tests/frame")
    return {**prompt, **more}


# Workflows as the front end saves them.


@pytest.mark.parametrize("name", NAMES)
def test_the_packs_workflows_are_converted_as_comfy_cli_does(name, server):
    for workflow in (read(name), set_mode(read(name), ACTIVE), set_mode(read(name), BYPASSED)):
        assert sent(to_api(workflow, server.object_info())) == sent(server.api(workflow))
    everything = set_mode(read(name), ACTIVE)
    assert sent(to_api(set_mode(everything, BYPASSED), server.object_info(), sorted(OURS))) == sent(
        server.api(everything)
    )


def test_official_templates_are_converted_as_comfy_cli_does(server):
    package = importlib.util.find_spec(TEMPLATES)
    if package is None:
        pytest.skip(f"this ComfyUI comes without the package {TEMPLATES}")
    folder = Path(next(iter(package.submodule_search_locations))) / "templates"
    subgraphs = 0
    for pattern in ("video_wan2_2*.json", "flux*.json", "image_qwen*.json"):
        for path in sorted(folder.glob(pattern)):
            workflow = json.loads(path.read_text("utf-8"))
            assert sent(to_api(workflow, server.object_info())) == sent(server.api(workflow)), path.name
            subgraphs += bool((workflow.get("definitions") or {}).get("subgraphs"))
    assert subgraphs


# Runs.


def small(workflow: dict) -> dict:
    """A copy of a UI workflow of the pack with small pictures and four steps."""
    for one in workflow["nodes"]:
        if one["type"] == "WanImageToVideo":
            one["widgets_values"] = [64, 64, 81, 1]
        elif str(one["id"]) == STEPS:
            one["widgets_values"][0] = 4
        elif one["title" if "title" in one else "type"].startswith("Switch to low noise"):
            one["widgets_values"][0] = 2
    return workflow


def test_a_workflow_per_kernel_and_number_of_frames(bench, tmp_path, capsys):
    given = set_mode(small(read("wan2.2_i2v_14b")), BYPASSED)
    status, rows = bench(given, "--kernels", "sdpa_math,sdpa", "--frames", "5,9", "--json", str(tmp_path / "a.json"))
    assert status == 0
    found = whole(rows)
    assert list(found) == [(kernel, frames) for frames in ("5", "9") for kernel in ("host", "sdpa_math", "sdpa")]
    for (kernel, frames), row in found.items():
        calls = 2 * 2 * 2 * 2 * 2  # stages, steps of each, CFG, blocks, self and cross
        assert (row["status"], row["observed"]) == ("measured", f"{kernel} {calls}")
        assert (row["width"], row["height"], row["workflow"]) == ("64", "64", "é flow")
        stages = {one["node"]: one for one in rows if (one["kernel"], one["frames"]) == (kernel, frames)}
        assert {"57", "58", "67", "8", "61"} <= set(stages)
        assert all(float(stages[key]["seconds"]) > 0 for key in ("57", "58", "67", "8", "61"))
        assert sum(float(one["seconds"] or 0) for one in stages.values() if one["node"]) <= float(row["seconds"])
        assert stages["57"]["steps"] == "2" and float(stages["57"]["seconds_per_step"]) > 0
        assert stages["62"]["status"] == "cached" and not stages["62"]["seconds"]
        if kernel == "host":
            assert row["largest_difference"] == "0" and row["psnr_db"] == "" and float(row["ssim"]) == 1
        else:
            assert float(row["psnr_db"] or "inf") > 50 and float(row["ssim"]) > 0.999
    assert {one["psnr_db"] for one in found.values()} != {""}, "sdpa and sub_quad do not give the same bits"
    assert len(json.loads((tmp_path / "a.json").read_text("utf-8"))["rows"]) == len(rows)
    shown = capsys.readouterr().out
    assert "é flow, 5 frames 64x64" in shown and "KSamplerAdvanced 57" in shown and "identical" in shown
    assert max(map(len, shown.splitlines())) <= 100
    csv_file = str(tmp_path / "é rows.csv")
    assert cli.main(["compare", csv_file, str(tmp_path / "a.json")]) == 0
    assert "1.000" in capsys.readouterr().out


def test_no_timed_run_comes_from_the_cache(bench, server):
    """Nor does one of a second bench of the same workflow; models and texts do."""
    for _ in range(2):
        _, rows = bench(decoded(), "--kernels", "host", "--repeats", "3")
        ran = {row["node"]: row for row in rows if row["node"]}
        assert {key: row["repeats"] for key, row in ran.items()} == dict.fromkeys(("7", "12", "13", "14", "21"), "3")
    last = max(server.get("/history?max_items=1").values(), key=lambda entry: entry["prompt"][0])
    cached = {key for name, data in last["status"]["messages"] if name == "execution_cached" for key in data["nodes"]}
    assert cached >= {"1", "2", "3", "5", "6", "20"}


def test_a_kernel_that_cannot_run_here_is_not_given_the_time_of_another(bench):
    status, rows = bench(decoded(), "--kernels", "sage3")
    row = whole(rows)["sage3", "5"]
    assert status == 0 and row["status"] == "other kernel" and row["observed"].startswith("host ")
    assert "sage3" in row["reason"] and "needs a cuda device" in row["reason"]


def test_a_length_that_fails_is_a_row_and_the_next_one_is_run(bench):
    cut = decoded(**{"22": node("TrimVideoLatent", samples=["13", 0], trim_amount=2)})
    cut["21"]["inputs"]["samples"] = ["22", 0]  # of 5 frames, two latent ones, nothing is left
    status, rows = bench(cut, "--kernels", "host", "--frames", "5,13")
    found = whole(rows)
    assert status == 0 and found["host", "13"]["status"] == "measured"
    assert found["host", "5"]["status"] == "failed" and "VAEDecode (node 21): " in found["host", "5"]["reason"]


def test_a_picture_without_frames(bench):
    one = picture("sd15")
    status, rows = bench(one, "--kernels", "sdpa", "--size", "32x64")
    found = whole(rows)["sdpa", ""]
    assert status == 0 and (found["width"], found["height"], found["ssim"]) == ("32", "64", "")


def test_models_that_the_server_lacks_are_named_and_nothing_is_written(bench, capsys):
    missing = decoded()
    missing["1"]["inputs"]["unet_name"] = "nowhere.safetensors"
    assert bench(missing) == (2, [])
    said = capsys.readouterr().err
    assert "UNETLoader (node 1)" in said and "nowhere.safetensors" in said and "does not accept" in said


def test_frames_are_checked_against_what_the_node_takes(bench, capsys):
    assert bench(decoded(), "--frames", "5,30") == (2, [])
    assert "EmptyHunyuanLatentVideo (node 7) takes 1, 5, 9" in capsys.readouterr().err


def test_ctrl_c_stops_the_servers_prompt_and_writes_what_was_measured(bench, server, monkeypatch, capsys):
    def interrupted(done, in_all, text):
        if text.startswith("sdpa") and "run 1" in text and "step" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench_command, "_progress", interrupted)
    status, rows = bench(decoded(length=9), "--kernels", "sdpa")
    assert status == 130 and list(whole(rows)) == [("host", "9")]
    assert "Incomplete: Ctrl+C" in capsys.readouterr().out
    deadline = time.monotonic() + 60
    while any(server.get("/queue").values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    last = max(server.get("/history?max_items=1").values(), key=lambda entry: entry["prompt"][0])
    assert "execution_interrupted" in [name for name, _ in last["status"]["messages"]]
    assert last["prompt"][2]["attune1"]["inputs"]["kernel"] == "sdpa"


def test_selectors_are_put_in_where_a_workflow_has_none(server):
    job = prepare(server.api(set_mode(read(NAMES[0]), BYPASSED)), server.object_info())
    stages = [key for key, data in job.prompt.items() if data["class_type"] == "KSamplerAdvanced"]
    assert len(job.selectors) == len(stages) == 2
    for key in stages:
        link = job.prompt[key]["inputs"]["model"]
        assert job.prompt[link[0]]["class_type"] == SELECTOR
