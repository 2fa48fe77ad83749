"""The test helpers themselves: a real server and a real browser answer as tests expect them to."""

import os
import subprocess
import sys

import pytest

from support.loading import ROOT
from support.server import PromptFailedError, PromptRejectedError


def picture(width=64):
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": width, "height": 64, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "picture"}},
    }


def test_a_prompt_runs_and_its_files_are_found(server):
    result = server.run(picture())
    assert [file.suffix for file in result.files] == [".png"]
    assert result.files[0].stat().st_size > 0
    assert result.runs == []


def test_a_node_that_ran_before_is_cached(server):
    server.run(picture(128))
    assert "1" in server.run(picture(128)).cached


def test_a_rejected_prompt_carries_the_errors_by_node(server):
    with pytest.raises(PromptRejectedError) as caught:
        server.submit(picture(width=-1))
    assert caught.value.status == 400
    assert caught.value.node_errors["1"]["class_type"] == "EmptyImage"


def test_a_failed_prompt_names_the_node(server):
    prompt = picture()
    prompt["3"] = {"class_type": "LoadLatent", "inputs": {"latent": "absent.latent"}}
    with pytest.raises((PromptFailedError, PromptRejectedError)):
        server.run({"3": prompt["3"], "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}}})


def test_a_page_loads_and_queues_a_workflow(page):
    page.load(
        {
            "nodes": [
                {"id": 1, "type": "EmptyImage", "pos": [100, 100], "size": [300, 150], "mode": 0, "flags": {},
                 "order": 0, "inputs": [], "properties": {}, "widgets_values": [64, 64, 1, 255],
                 "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}]},
                {"id": 2, "type": "PreviewImage", "pos": [500, 100], "size": [300, 300], "mode": 0, "flags": {},
                 "order": 1, "properties": {}, "widgets_values": [], "outputs": [],
                 "inputs": [{"name": "images", "type": "IMAGE", "link": 1}]},
            ],
            "links": [[1, 1, 0, 2, 0, "IMAGE"]],
            "last_node_id": 2, "last_link_id": 1, "groups": [], "config": {}, "extra": {}, "version": 0.4,
        }
    )  # fmt: skip
    assert page.node_types_missing() == []
    assert page.prompt()["1"]["inputs"]["width"] == 64
    assert page.queue().outputs["2"]["images"]
    assert page.problems == []


def collect(*arguments, **env):
    """Run pytest on this file in another process; returns the finished process."""
    clean = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_support.py")]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, encoding="utf-8", cwd=ROOT, env={**clean, **env}
    )


def test_without_a_browser_a_test_is_skipped_with_the_command_but_fails_in_ci(tmp_path):
    absent = str(tmp_path / "chrome")
    skipped = collect("-k", "test_a_page", CHROME=absent)
    assert skipped.returncode == 0, skipped.stdout
    assert "2 skipped" in skipped.stdout and "python3 dev.py test --browser" in skipped.stdout
    failed = collect("-k", "test_a_page", CHROME=absent, CI="true")
    assert failed.returncode == 1
    assert "2 errors" in failed.stdout


def test_no_comfyui_leaves_out_what_needs_one_and_says_so():
    process = collect("--no-comfyui", "--collect-only", "-q")
    assert "test_no_comfyui_leaves_out" in process.stdout
    assert "test_a_prompt_runs" not in process.stdout and "test_a_page" not in process.stdout
    assert "--no-comfyui: 6 tests that need ComfyUI, a browser or a GPU were left out" in process.stdout
