"""The demo of dev.py: its server, what it prints, and the whole of it."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest

from attune_devtools import broken, demo, host, report, say, small
from attune_devtools.shrink import shrink
from support.dev import dev
from support.loading import ROOT
from support.workflows import NAMES, read

# The server


def test_the_server_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "main.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(120)\n", "utf-8")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "devtools" / "run_host.py"), str(tmp_path / "main.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout.readline().strip() == b"up"
    server.stdin.close()
    assert server.wait(timeout=20) == 0
    server.stdout.close()


def test_a_server_that_dies_at_start_is_said_with_its_last_words(tmp_path):
    (tmp_path / "main.py").write_text("raise SystemExit('no such device')", "utf-8")
    with pytest.raises(say.Stop, match=r"exit code 1; its last words: no such device .*server\.log"):
        host.Host(sys.executable, tmp_path, tmp_path).start()


class Served:
    """A started server with this environment, and what is done with it."""

    url, log = "http://127.0.0.1:1", "server.log"

    def __init__(self, env=None, ended_with=None):
        self.env, self.ended_with, self.did = env, ended_with, []
        self.process = self

    def start(self):
        self.did.append("start")

    def wait(self):
        self.did.append("wait")
        if self.ended_with is None:
            raise KeyboardInterrupt
        return self.ended_with

    def stop(self):
        self.did.append("stop")

    def post(self, path, data):
        self.did.append((path, data))


def test_a_server_is_left_to_the_user_until_he_stops_it(capsys):
    demo.wait_for_the_user(served := Served())
    assert served.did == [("/free", {"free_memory": True}), "wait"], "what he runs is not taken from the cache"
    assert capsys.readouterr().out == "    stopped\n"


def test_a_server_that_ends_under_the_user_is_an_error():
    with pytest.raises(say.Stop, match=r"ended by itself with exit code 3; look into server\.log"):
        demo.wait_for_the_user(Served(ended_with=3))


# The small workflow


def test_the_small_file_of_every_workflow_gives_the_prompt_of_the_demo(server):
    try:
        for name in NAMES:
            ui = read(name)
            prompt = server.api(ui)
            lowered, said = shrink(prompt, small.CPU_SIZE, small.CPU_LENGTH, small.CPU_STEPS)
            small.save(server.base, ui, prompt, lowered)
            saved = json.loads(small.file_of(server.base).read_text("utf-8"))
            assert said and server.api(saved) == lowered, name
            assert ui == read(name)
        assert server.get("/userdata?dir=workflows") == ["attune demo small.json"]
        assert small.where(server.base, on_cpu=True).startswith('"attune demo small" under Workflows')
        assert small.where(server.base, on_cpu=False) == "the workflow under Templates, Extensions"
    finally:
        small.file_of(server.base).unlink(missing_ok=True)


@pytest.mark.parametrize("key", ["3", "9:3"])  # an old file does not say which inputs have values; a node of a subgraph
def test_where_a_number_has_no_place_there_is_no_small_file(tmp_path, key):
    ui = {"nodes": [{"id": 3, "type": "WanImageToVideo", "inputs": [], "widgets_values": [640, 640, 81, 1]}]}
    small.file_of(tmp_path).parent.mkdir(parents=True)
    small.file_of(tmp_path).write_text("of an earlier demo", "utf-8")
    prompt = {key: {"class_type": "WanImageToVideo", "inputs": {"width": 640}}}
    small.save(tmp_path, ui, prompt, shrink(prompt, 64, 5, 2)[0])
    assert not small.file_of(tmp_path).exists()
    assert "width and height 64, length 5, 2 steps" in small.where(tmp_path, on_cpu=True)


# What it prints


def test_a_bar_prints_tenths_when_there_is_no_terminal():
    out = io.StringIO()
    bar = say.Bar("torch", out)
    for done in range(101):
        bar.show(done, 100, "MB")
    bar.close()
    assert len(out.getvalue().splitlines()) == 11
    assert out.getvalue().splitlines()[-1].split() == ["100%", "torch,", "100", "of", "100", "MB"]


def test_a_bar_stays_on_one_line_of_a_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 20)))
    bar = say.Bar("a label that is much longer than the terminal is wide, truly", out)
    bar.show(1, 2)
    bar.show(2, 2)
    bar.close()
    assert out.getvalue().count("\n") == 1
    assert all(len(part.rstrip("\n")) < 60 for part in out.getvalue().split("\r"))


TWO_STAGES = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors"}},
    "2": {"class_type": "AttentionSelector", "inputs": {"model": ["1", 0], "kernel": "sage3"}},
    "3": {"class_type": "WanImageToVideo", "inputs": {"width": 640, "height": ["4", 0], "length": 81, "steps": "x"}},
    "4": {"class_type": "PrimitiveInt", "inputs": {"value": 480}},
    "5": {
        "class_type": "KSamplerAdvanced",
        "inputs": {"model": ["2", 0], "steps": 20, "start_at_step": 10, "end_at_step": 10000},
    },
}


def test_the_prompt_is_lowered_where_its_numbers_stand():
    small, said = shrink(TWO_STAGES, size=64, length=5, steps=2)
    assert small["3"]["inputs"] == {"width": 64, "height": ["4", 0], "length": 5, "steps": "x"}
    assert small["4"]["inputs"]["value"] == 64
    assert small["5"]["inputs"] == {"model": ["2", 0], "steps": 4, "start_at_step": 2, "end_at_step": 10000}
    assert "length 81 -> 5 (node 3)" in said
    assert TWO_STAGES["3"]["inputs"]["width"] == 640


def test_a_branch_is_named_after_the_model_that_feeds_its_sampler():
    assert report.branch(TWO_STAGES, "5") == "high noise"
    assert report.branch(TWO_STAGES, "4") == "sampler 4"


def test_the_report_says_what_ran_and_why_not_what_was_asked_for(capsys):
    node = {
        "node_type": "AttentionSelector",
        "requested": "sage3",
        "observed": {"sdpa": 16},
        "refused": [{"kernel": "sage3", "reasons": ["needs CUDA, found cpu"], "calls": 16}],
    }
    run = {"sampler_node": "5", "model": "WAN21", "forwards": 4, "status": "finished", "observed": {"sdpa": 16}}
    report.calls([{**run, "nodes": {"2": node}, "notes": ["a note"]}], TWO_STAGES)
    said = capsys.readouterr().out
    for words in ("high noise: sdpa x16", "asked for sage3: sdpa x16", "not sage3 (16 calls): needs CUDA", "a note"):
        assert words in said


def test_a_run_without_a_video_is_an_error(tmp_path):
    with pytest.raises(say.Stop, match="wrote no video"):
        report.video({"outputs": {"9": {"images": [{"type": "output", "subfolder": "", "filename": "a"}]}}}, tmp_path)


# The whole


def test_the_pack_loads_from_a_path_with_a_space_and_letters_beyond_ascii(make_server):
    server = make_server(folder="My packs ä é 包 - ")
    try:
        assert "AttentionSelector" in server.object_info(), server.output()
        assert server.get("/attune/runs") == {"runs": []}
    finally:
        server.stop()


def test_the_demo_runs_the_main_workflow_to_a_video(comfyui_folder, models):
    process = dev(ROOT, "demo", COMFYUI_PATH=str(comfyui_folder))
    lines = process.stdout.splitlines()
    assert process.returncode == 0, process.stdout + process.stderr
    assert lines[-1] == "demo: ok"
    for words in ("==> Machine", "==> Kernels on this machine", "high noise: ", "low noise: ", ".mp4"):
        assert any(words in line for line in lines), process.stdout


def test_a_demo_without_records_of_the_pack_fails(comfyui_folder, models, tmp_path):
    server = host.Host(sys.executable, comfyui_folder, tmp_path, ["--cpu", "--disable-all-custom-nodes"])
    try:
        server.start()
        with pytest.raises(say.Stop, match=r"GET /attune/runs answered 404: the pack did not load"):
            demo.runs_of(server, "any")
    finally:
        server.stop()


# With a kernel that breaks


@pytest.fixture
def broken_run(monkeypatch, tmp_path):
    """broken_run(serve, apart, calls): broken_demo() with runs that are made up; (exit code, servers, kernels)."""

    def run(serve=False, apart=3.0, calls=None):
        servers, kernels = [], []

        def server(env):
            servers.append(Served(env))
            return servers[-1]

        def once(_venv, _ui, _base, host, _on_cpu, kernel):
            assert host is servers[-1] and host.did == ["start"]
            kernels.append(kernel)
            (tmp_path / "demo-broken").mkdir(exist_ok=True)
            (tmp_path / "demo-broken" / "failures.json").write_text("{}", "utf-8")
            return tmp_path / f"{kernel}.mp4", {"host": 16} if kernel == "host" else calls or {broken.KERNEL: 8}

        monkeypatch.setattr(broken, "CACHE", tmp_path)
        monkeypatch.setattr(broken, "_once", once)
        monkeypatch.setattr(broken, "_report", lambda *_: "demotion of sage2_fp8_cuda")
        monkeypatch.setattr(broken, "script", lambda *_: f'{{"frames": 5, "difference": {apart}}}')
        try:
            return broken.broken_demo("nan", None, {}, tmp_path, server, True, serve), servers, kernels
        finally:
            assert all(one.did[-1] == "stop" for one in servers)

    return run


def test_a_demo_with_a_broken_kernel_is_held_against_a_run_without(broken_run, capsys):
    code, (clean, faulty), kernels = broken_run()
    said = capsys.readouterr().out
    assert code == 0
    assert "demotion of sage2_fp8_cuda" in said and said.endswith("demo: ok\n")
    assert kernels == ["host", "sage2_fp8_cuda"]
    assert clean.did == faulty.did == ["start", "stop"]
    assert "ATTUNE_STANDIN_FAULT" not in clean.env
    assert faulty.env["ATTUNE_STANDIN_FAULT"] == "sage2_fp8_cuda:nan:from=8"  # half of 16 calls


@pytest.mark.parametrize(
    ("apart", "calls", "wrong"), [(60.0, None, "is not clean"), (3.0, {"host": 16}, "did not compute a single call")]
)
def test_a_demo_whose_broken_kernel_spoils_the_video_or_never_ran_fails(broken_run, capsys, apart, calls, wrong):
    with pytest.raises(say.Stop, match=wrong):
        broken_run(serve=True, apart=apart, calls=calls)
    assert "demo: ok" not in capsys.readouterr().out


def test_a_broken_kernel_is_left_to_the_user_as_if_it_had_never_failed(broken_run, tmp_path, capsys):
    code, (clean, faulty), _ = broken_run(serve=True)
    said = capsys.readouterr().out
    assert code == 0
    assert clean.did == ["start", "stop"] and faulty.did == ["start", ("/free", {"free_memory": True}), "wait", "stop"]
    assert not (tmp_path / "demo-broken" / "failures.json").exists()
    for words in (faulty.url, "Choose sage2_fp8_cuda", "Templates", "Probe again", "Bypass all", "demo: ok"):
        assert words in said
    assert said.endswith("demo: ok\n    stopped\n")
