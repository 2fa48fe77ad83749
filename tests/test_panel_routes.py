"""The panel's routes in a real ComfyUI, over raw HTTP: what they give, and what becomes of bad requests."""

from __future__ import annotations

import getpass
import http.client
import io
import json
import socket
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from PIL import Image

import comfyui_attune
from comfyui_attune.kernels import KERNELS
from comfyui_attune.measure.run_cells import step_cells
from comfyui_attune.measure.run_text import read_run
from support.loading import ROOT
from support.prompts import selector, two_stage

JSON = {"Content-Type": "application/json"}
MOST = 2_000_000  # bytes of an answer


def ask(server, method: str, path: str, body: bytes | str | None = None, headers=None) -> tuple[int, dict, bytes]:
    """(status, headers, body) of one request; nothing is added to its headers but Host and the length."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def read(server, path: str):
    status, headers, body = ask(server, "GET", path)
    assert status == 200 and headers["Content-Type"].startswith("application/json") and len(body) <= MOST
    return json.loads(body, parse_constant=lambda name: pytest.fail(f"browsers cannot read {name}"))


@pytest.fixture(scope="module")
def run(server):
    """The second of two runs that have ended, as /attune/runs lists it."""

    def patch(prompt, model, stage):
        return selector(prompt, model, str(60 + stage), "split", time_calls=True, cross_attention="basic")

    prompt = two_stage(patch, steps=6)
    prompt["12"]["inputs"]["noise_seed"] = prompt["13"]["inputs"]["noise_seed"] = 4711
    return server.run(prompt).runs[-1]


# What they give


def test_the_machine_in_four_lines(server):
    found = read(server, "/attune/machine")
    assert found["version"] == comfyui_attune.__version__ and found["comfyui"] and found["off"] is False
    device, versions, own, default = found["lines"]
    assert device.startswith("cpu: ") and f"PyTorch {torch.__version__}" in versions
    assert own.startswith("ComfyUI's own attention: ") and default.startswith("Without a node: ComfyUI's own")
    assert found["default"]["requested"] == "" and any("--cpu" in remark for remark in found["remarks"])


def test_every_kernel_with_its_verdict_its_cause_and_its_cure(server):
    deadline = time.monotonic() + 120
    while any(row["outcome"] == "open" for row in read(server, "/attune/kernels")["kernels"]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    rows = {row["name"]: row for row in read(server, "/attune/kernels")["kernels"]}
    assert set(rows) == {kernel.name for kernel in KERNELS} | {"sub_quad", "basic"}
    good, absent, hosts = rows["sdpa"], rows["flash2"], rows["basic"]
    assert good["outcome"] == "works" and 0 <= good["error"] <= good["allowed"] and good["milliseconds"] > 0
    assert good["timed"] and good["cure"] is None and good["can_run_here"]
    assert absent["outcome"] == "not installed" and "cuda" in absent["cause"] and not absent["can_run_here"]
    assert set(absent["cure"]) == {"text", "command", "source"}
    assert hosts["outcome"] == "" and hosts["cause"] == "" and hosts["cure"] is None
    assert all(row["verdict"] == row["outcome"] for row in rows.values())


def test_a_run_with_its_cells_is_what_its_file_tells(server, run):
    found = read(server, f"/attune/runs/{run['run']}")
    assert found["run"] == run["run"] and found["status"] == "finished" and found["left_out"] == []
    assert "patterns" not in found and all("patterns" not in step for step in found["steps"])
    status, headers, body = ask(server, "GET", f"/attune/runs/{run['run']}/report?format=json")
    assert status == 200 and f'filename="attune-run-{run["run"]}.json"' in headers["Content-Disposition"]
    told = {
        (step, block, kind, kernel): calls
        for step, cells in step_cells(json.loads(body)).items()
        for (block, kind), kernels in cells.items()
        for kernel, calls in kernels.items()
    }
    names = found["kernel_names"]
    assert {(step, block, kind, names[kernel]): calls for step, block, kind, kernel, calls in found["cells"]} == told
    assert {step for step, *_ in told} == {3, 4, 5} and {kernel for *_, kernel in told} == {"split", "basic"}
    assert found["kernels"]["split"]["seconds"] > 0


def test_the_list_tells_when_each_run_began_and_how_long_it_took(server, run):
    row = next(row for row in read(server, "/attune/runs")["runs"] if row["run"] == run["run"])
    whole = read(server, f"/attune/runs/{run['run']}")
    assert (row["started"], row["seconds"]) == (whole["started"], whole["seconds"]) and row["seconds"] > 0
    began = datetime.fromisoformat(row["started"].replace("Z", "+00:00"))
    assert 0 <= (datetime.now(timezone.utc) - began).total_seconds() < 600


def test_a_report_as_text_as_a_file_and_as_a_picture(server, run, tmp_path):
    place = f"/attune/runs/{run['run']}/report"
    status, headers, text = ask(server, "GET", place)
    assert status == 200 and headers["Content-Type"] == "text/plain; charset=utf-8"
    assert "Ran: split ×6, basic ×6" in text.decode("utf-8")
    file = tmp_path / "run.json"
    file.write_bytes(ask(server, "GET", f"{place}?format=json")[2])
    assert read_run(file)["sampler_node"] == "13"
    status, headers, pixels = ask(server, "GET", f"{place}?format=png")
    assert status == 200 and headers["Content-Type"] == "image/png" and headers["Content-Disposition"].endswith('.png"')
    with Image.open(io.BytesIO(pixels)) as image:
        assert image.size[0] >= 1200


def test_the_bundle_is_what_the_command_writes_and_names_nobody(server):
    status, headers, body = ask(server, "GET", "/attune/bundle")
    assert status == 200 and headers["Content-Type"].startswith("text/plain") and len(body) <= MOST
    bundle = json.loads(body)
    assert bundle["kind"] == "attune doctor bundle" and len(bundle["kernels"]) == len(KERNELS)
    assert set(bundle) == {
        "kind", "schema", "text", "machine", "device", "remarks", "outlook", "kernels", "elsewhere", "packages",
        "environment",
    }  # fmt: skip
    text = body.decode("utf-8")
    assert str(Path.home()) not in text and str(ROOT) not in text.replace("<home>", str(Path.home()))
    assert f'"{getpass.getuser()}"' not in text


def test_an_answer_is_at_most_two_megabytes_and_says_what_it_goes_without(comfy):
    from comfyui_attune.host.routes import _bounded

    rows = [[1, 2, "self", 0, 3]] * 30_000
    assert json.loads(_bounded({"cells": rows, "plans": [], "x": float("nan")})) == {
        "cells": rows, "plans": [], "x": None, "left_out": [],
    }  # fmt: skip
    found = json.loads(
        _bounded({"plans": ["ä" * 900_000], "cells": rows * 4, "nodes": {"1": {}}, "status": "finished"})
    )
    assert found == {
        "plans": [], "cells": [], "nodes": {"1": {}}, "status": "finished", "left_out": ["plans", "cells"],
    }  # fmt: skip


def test_they_are_under_api_too_and_head_has_no_body(server):
    assert ask(server, "GET", "/api/attune/machine")[2] == ask(server, "GET", "/attune/machine")[2]
    status, _, body = ask(server, "HEAD", "/attune/runs")
    assert status == 200 and body == b""


# What is refused


def post(path: str, data: str | bytes, **headers: str):
    return ("POST", path, data, {**JSON, **headers})


WATCH, PROBE = "/attune/watch", "/attune/probe"
GOOD = json.dumps({"client_id": "nobody", "on": True})
REFUSED = {
    "a run that is not there": (404, ("GET", "/attune/runs/999999", None, {})),
    "a run without a number": (404, ("GET", "/attune/runs/..%2f..%2fetc", None, {})),
    "a number of thousands of digits": (404, ("GET", f"/attune/runs/{'9' * 3000}", None, {})),
    "digits of another script": (404, ("GET", "/attune/runs/%D9%A1", None, {})),
    "a negative number": (404, ("GET", "/attune/runs/-1/report", None, {})),
    "an unknown format": (400, ("GET", "/attune/runs/1/report?format=../../x", None, {})),
    "to write what can be read": (405, post("/attune/machine", "{}")),
    "to delete the runs": (405, ("DELETE", "/attune/runs", None, {})),
    "to put a run": (405, ("PUT", "/attune/runs/1", b"{}", JSON)),
    "to patch a report": (405, ("PATCH", "/attune/runs/1/report", b"{}", JSON)),
    "to read what is triggered": (405, ("GET", WATCH, None, {})),
    "an odd method": (405, ("LOCK", PROBE, None, {})),
    "no content type": (415, ("POST", WATCH, GOOD, {})),
    "a form": (415, ("POST", PROBE, "kernels=sdpa", {"Content-Type": "application/x-www-form-urlencoded"})),
    "plain text, which needs no leave of the server": (415, ("POST", WATCH, GOOD, {"Content-Type": "text/plain"})),
    "no body": (400, post(WATCH, "")),
    "no JSON": (400, post(WATCH, "{'client_id'")),
    "what is called compressed and is not": (400, post(WATCH, "{}", **{"Content-Encoding": "gzip"})),
    "no letters": (400, post(WATCH, b"\xff\xfe\x00{}")),
    "a list": (400, post(WATCH, "[]")),
    "a number": (400, post(PROBE, "17")),
    "null": (400, post(PROBE, "null")),
    "deep JSON": (400, post(PROBE, "[" * 30_000)),
    "a deep object": (400, post(PROBE, '{"a":' * 10_000)),
    "a number that takes an age to read": (400, post(PROBE, "9" * 60_000)),
    "a large body": (413, post(PROBE, json.dumps({"kernels": ["sdpa"] * 20_000}))),
    "an unknown key": (400, post(WATCH, json.dumps({"client_id": "a", "on": True, "path": "/etc"}))),
    "a command": (400, post(PROBE, json.dumps({"kernels": ["sdpa"], "command": "x"}))),
    "no client": (400, post(WATCH, json.dumps({"on": True}))),
    "a client that is a number": (400, post(WATCH, json.dumps({"client_id": 7, "on": True}))),
    "a client that is a list": (400, post(WATCH, json.dumps({"client_id": ["a"], "on": True}))),
    "an empty client": (400, post(WATCH, json.dumps({"client_id": "", "on": True}))),
    "a long client": (400, post(WATCH, json.dumps({"client_id": "a" * 129, "on": True}))),
    "a switch that is a word": (400, post(WATCH, json.dumps({"client_id": "a", "on": "yes"}))),
    "no switch": (400, post(WATCH, json.dumps({"client_id": "a"}))),
    "a client that is not there": (404, post(WATCH, GOOD)),
    "half a letter as client": (404, post(WATCH, '{"client_id": "\\ud800\\n", "on": true}')),
    "an unknown kernel": (400, post(PROBE, json.dumps({"kernels": ["sdpa", "rm -rf /\n"]}))),
    "a kernel of the host": (400, post(PROBE, json.dumps({"kernels": ["basic"]}))),
    "kernels that are a word": (400, post(PROBE, json.dumps({"kernels": "sdpa"}))),
    "kernels that are objects": (400, post(PROBE, json.dumps({"kernels": [{"name": "sdpa"}]}))),
    "no kernels": (400, post(PROBE, json.dumps({"kernels": []}))),
    "another site": (403, post(WATCH, GOOD, Origin="https://evil.example")),
    "another site by the browser's word": (403, post(PROBE, "{}", **{"Sec-Fetch-Site": "cross-site"})),
    "another server on this machine": (403, post(PROBE, "{}", Origin="http://127.0.0.1:1")),
    "a page in a sandbox": (403, post(PROBE, "{}", Origin="null")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_and_that_the_log_has_one_line_of_it(server, what):
    wanted, request = REFUSED[what]
    before = len(server.output())
    status, headers, body = ask(server, *request)
    assert status == wanted
    time.sleep(0.02)  # the log is a file
    lines = [line for line in server.output()[before:].splitlines() if line.strip()]
    assert len(lines) <= 1 and not any("Traceback" in line for line in lines), lines
    if body:  # else it was ComfyUI's own check of the origin
        assert 10 < len(json.loads(body)["error"]) < 600 and str(wanted) in lines[0]
        assert lines[0].isascii() and len(lines[0]) < 700
    if wanted == 405:
        assert headers["Allow"] in ("GET, HEAD", "GET, HEAD, POST", "POST")


def test_a_body_without_an_end_is_given_up(server):
    before = len(server.output())
    head = f"POST {WATCH} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:  # longer than it may be, in pieces
        raw.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        raw.settimeout(20)
        try:
            for _ in range(200):
                raw.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        except OSError:
            pass  # it has hung up
        try:
            answer = raw.recv(4096)
        except ConnectionError:
            answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", server.port)) as raw:  # and one that hangs up half-way
        raw.sendall(f"{head}Content-Length: 500\r\n\r\n{{".encode())
    assert read(server, PROBE)["running"] is False
    time.sleep(0.2)
    said = server.output()[before:]
    assert "Traceback" not in said and "413" in said


def test_a_page_of_this_server_is_let_in_by_each_of_its_names(server):
    for origin, host in (
        (f"http://127.0.0.1:{server.port}", f"127.0.0.1:{server.port}"),
        (f"http://localhost:{server.port}", f"localhost:{server.port}"),
        ("https://comfy.example", "comfy.example"),  # behind a proxy
        ("https://comfy.example", "backend:8188"),  # behind one that tells its own name
    ):
        headers = {**JSON, "Origin": origin, "Host": host, "Sec-Fetch-Site": "same-origin"}
        status, _, body = ask(server, "POST", WATCH, GOOD, headers)
        assert status == 404, (origin, host, body)  # nobody of this name is connected


def test_where_the_server_lets_every_site_in_the_triggers_do_not(make_server):
    """With --enable-cors-header ComfyUI asks nobody where he comes from."""
    off = make_server("--enable-cors-header", "http://friend.example", env={"ATTUNE": "off"})
    try:
        before = len(off.output())
        assert ask(off, *post(WATCH, GOOD, Origin="https://evil.example"))[0] == 403
        assert ask(off, *post(WATCH, GOOD, **{"Sec-Fetch-Site": "cross-site"}))[0] == 403
        for odd in ("http://[", "http://127.0.0.1:99999999", "null", ""):
            assert ask(off, *post(WATCH, GOOD, Origin=odd))[0] == 403
        said = off.output()[before:].splitlines()
        assert len(said) == 6 and all("another site" in line for line in said)
        friend = post(WATCH, GOOD, Origin="http://friend.example", **{"Sec-Fetch-Site": "cross-site"})
        status, _, body = ask(off, *friend)
        assert status == 200 and json.loads(body)["live"] is False, "ATTUNE=off: nothing is watched"
        status, _, body = ask(off, *post(PROBE, "{}"))
        assert status == 409 and b"ATTUNE=off" in body
        assert read(off, "/attune/machine")["off"] is True
        assert {row["outcome"] for row in read(off, "/attune/kernels")["kernels"]} == {""}
    finally:
        off.stop()
