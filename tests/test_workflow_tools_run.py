"""`attune workflow run`: what is said where a server does not take a workflow, or is none."""

from __future__ import annotations

import http.server
import json
import threading
import time

import pytest

from attune_devtools.host import free_port
from comfyui_attune import cli
from comfyui_attune.measure.workflow_refusal import why_rejected
from comfyui_attune.measure.workflow_server import Server

CLIP = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"  # of the tiny models


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def flow(**more) -> dict:
    """Loads a text encoder, and shows what it makes of a text."""
    return {
        "1": node("CLIPLoader", clip_name=CLIP, type="wan"),
        "2": node("CLIPTextEncode", clip=["1", 0], text="x"),
        "3": node("PreviewAny", source=["2", 0]),
        **more,
    }


@pytest.fixture
def run(tmp_path, capsys):
    """run(prompt, url): (status, what was printed, what was printed as an error)."""
    path = tmp_path / "工 flow.json"

    def go(prompt: dict, url: str) -> tuple[int, str, str]:
        path.write_text(json.dumps(prompt), "utf-8")
        status = cli.main(["workflow", "run", str(path), "--server", url])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.out, said.err

    return go


REFUSED = {
    "a model that is not there": (
        {"1": node("CLIPLoader", clip_name="nowhere.safetensors", type="wan")},
        "CLIPLoader (node 1): input clip_name: found 'nowhere.safetensors', wanted 'umt5",
        "put that file into the folder of ComfyUI that this node reads",
    ),
    "a choice that is not there": (
        {"1": node("CLIPLoader", clip_name=CLIP, type="wan", device="abacus")},
        "input device: found 'abacus', wanted 'default', 'cpu'",
        "choose another in the workflow",
    ),
    "a node that is not there": (
        {"1": node("NoSuchNode")}, "NoSuchNode (node 1): found no node of that name", "install the pack",
    ),
    "an output that is not there": (
        {"2": node("CLIPTextEncode", clip=["1", 5], text="x")},
        "CLIPTextEncode (node 2): found a link to a node or an output that is not there (clip from output 5 of node 1)",
        "link it anew",
    ),
    "an output of another type": (
        {"1": node("EmptyLatentImage", width=64, height=64, batch_size=1)},
        "input clip: found LATENT from EmptyLatentImage (node 1), wanted CLIP",
        "link another output",
    ),
    "an input without a value": (
        {"2": node("CLIPTextEncode", clip=["1", 0])},
        "CLIPTextEncode (node 2): input text: found nothing, wanted a value or a link",
        "give it one",
    ),
    "a number too large": (
        {"4": node("EmptyLatentImage", width=10**6, height=64, batch_size=1), "3": node("PreviewAny", source=["4", 0])},
        "EmptyLatentImage (node 4): input width: found 1000000, wanted INT at least 16 and at most 16384",
        "change it",
    ),
    "a picture that is not there": (
        {"4": node("LoadImage", image="nowhere.png"), "3": node("PreviewAny", source=["4", 0])},
        "LoadImage (node 4): input image: found 'nowhere.png'",
        "Invalid image file",
    ),
    "nothing to show": (
        {"3": node("CLIPTextEncode", clip=["1", 0], text="y")}, "found no node that saves or shows anything", "add it",
    ),
}  # fmt: skip


def test_a_refusal_says_which_node_and_input_what_was_wanted_and_what_to_do(server, run):
    for name, (more, *wanted) in REFUSED.items():
        status, out, error = run(flow(**more), server.url)
        assert status == 2 and not out and error.count("\n") == 1, (name, error)
        assert all(part in error for part in ["does not accept the workflow", *wanted]), (name, error)
    status, _, error = run(flow(**{"2": node("CLIPTextEncode", clip=["9", 0], text="x")}), server.url)
    assert status == 2 and "link 1 to node 2 comes from node 9" in error
    both = {"2": node("CLIPTextEncode", clip=["1", 0]), "1": node("CLIPLoader", clip_name="n.safetensors", type="w")}
    assert "; and " in run(flow(**both), server.url)[2]


def test_a_part_that_is_refused_is_told_and_is_no_success(server, run):
    odd = {"4": node("LoadImage", image="nowhere.png"), "5": node("PreviewAny", source=["4", 0])}
    status, out, error = run(flow(**odd), server.url)
    assert status == 1 and out.startswith("success") and "a part was not run: LoadImage (node 4): input image" in error


def test_an_error_in_the_middle_is_told_with_its_node(server, run):
    latent = {"4": node("EmptyLatentImage", width=64, height=64, batch_size=1)}
    save = {"5": node("SaveLatent", samples=["4", 0], filename_prefix="../../../../x")}
    status, out, _ = run({**latent, **save}, server.url)
    assert status == 1 and out.startswith("error after") and "SaveLatent (node 5): Exception: " in out


def waiting(server, name: str) -> str:
    """The id of the first prompt in a part of the queue, once there is one."""
    for _ in range(200):
        if found := server.get("/queue")[name]:
            return found[0][1]
        time.sleep(0.05)
    raise TimeoutError(name)


def test_one_that_is_taken_out_of_the_queue_and_one_that_is_stopped(server, run, monkeypatch):
    monkeypatch.setattr("comfyui_attune.measure.workflow_server._SILENT", 2)
    slow = {
        "1": node("UNETLoader", unet_name="wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", weight_dtype="default"),
        "2": node("CLIPLoader", clip_name=CLIP, type="wan"),
        "3": node("CLIPTextEncode", clip=["2", 0], text="x"),
        "4": node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1),
        "5": node("KSampler", model=["1", 0], positive=["3", 0], negative=["3", 0], latent_image=["4", 0], seed=1,
                  steps=5000, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0),
        "6": node("PreviewAny", source=["5", 0]),
    }  # fmt: skip
    server.post("/prompt", {"prompt": slow})
    waiting(server, "queue_running")

    def take_out() -> None:
        server.post("/queue", {"delete": [waiting(server, "queue_pending")]})

    thread = threading.Thread(target=take_out)
    thread.start()
    status, out, _ = run(flow(), server.url)
    thread.join()
    assert status == 1 and out.startswith("interrupted") and "taken out of the server's queue" in out

    def stop() -> None:
        waiting(server, "queue_pending")
        server.interrupt()  # what is there before it
        while waiting(server, "queue_running") == first:
            time.sleep(0.05)
        time.sleep(0.5)
        server.interrupt()

    first = waiting(server, "queue_running")
    thread = threading.Thread(target=stop)
    thread.start()
    slow["5"]["inputs"]["seed"] = 2
    status, out, _ = run(slow, server.url)
    thread.join()
    assert status == 1 and out.startswith("interrupted") and "somebody stopped it at the server" in out


# What is no ComfyUI.


@pytest.fixture
def other(request):
    """The address of a server that gives the same answer to everything."""
    code, kind, body = request.param

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        ((404, "text/html", b"<html>Not Found</html>"), "/object_info answered 404: wanted a ComfyUI"),
        ((401, "text/html", b"<html>log in</html>"), "answered 401: wanted a ComfyUI, without a login"),
        ((200, "text/html", b"<html>hello</html>"), "is no ComfyUI: wanted JSON at /object_info"),
        ((200, "application/json", b"{}"), "is no ComfyUI: wanted its list of nodes"),
        ((200, "application/json", b"[1]"), "is no ComfyUI: wanted its list of nodes"),
    ],
    indirect=["other"],
)
def test_a_server_of_another_kind(other, wanted, run):
    status, out, error = run(flow(), other)
    assert status == 2 and not out and error.count("\n") == 1
    assert wanted in error and "look at the address" in error


def test_no_server_and_no_address(run):
    status, _, error = run(flow(), f"127.0.0.1:{free_port()}")
    assert status == 2 and "start it (python main.py" in error
    for url in (
        "",
        "http://",
        "ftp://x",
        "127.0.0.1:99999",
        "http://127.0.0.1:x",
        "http://[::1",
        "http://a b",
        "http://a\n",
    ):
        status, _, error = run(flow(), url)
        assert status == 2 and error.count("\n") == 1 and "is no address of a ComfyUI: wanted http://" in error, url


# Answers of other versions, and of no version at all.


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (b"", "it does not say why"),
        (b"<html><h1>Bad</h1> request</html>", "Bad request"),
        (b"[" * 100_000, "[[["),
        (b"[1]", "[1]"),
        (b'{"error": {"type": "invalid_prompt", "message": "Cannot execute because node X does not exist.", '
         b'"details": "Node ID \'#1\'", "extra_info": {}}, "node_errors": []}', "node X does not exist.: Node ID '#1'"),
        (b'{"error": "full"}', "full"),
        (b'{"node_errors": {"1": {"errors": [{"type": "new", "message": "Odd", "details": "very"}]}}}', "Odd: very"),
        (b'{"node_errors": {"1": {"errors": [{"type": "value_not_in_list", "extra_info": {"input_config": 3}}]}}}',
         "found null"),
        (b'{"node_errors": {"1": {"errors": [7]}}}', "node_errors"),
    ],
)  # fmt: skip
def test_whatever_it_answers_there_is_a_reason(answer, wanted):
    said = why_rejected(answer, flow())
    assert wanted in said and len(said) < 600 and "\n" not in said


def test_a_long_list_of_choices_is_not_told_whole():
    config = [[f"model {number}.safetensors" for number in range(12)], {}]
    extra = {"input_name": "clip_name", "input_config": config, "received_value": "x" * 500}
    error = {"type": "value_not_in_list", "details": "", "extra_info": extra}
    said = why_rejected({"node_errors": {"1": {"errors": [error]}}}, flow())
    assert "'model 4.safetensors' or 7 others" in said and "model 5" not in said and len(said) < 500
    error |= {"details": "clip_name: 'x' not in (list of length 40)", "extra_info": {**extra, "input_config": None}}
    assert "wanted one of the 40 that it has" in why_rejected({"node_errors": {"1": {"errors": [error]}}}, flow())


def test_a_server_that_has_lost_the_prompt_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("comfyui_attune.measure.workflow_server._SILENT", 2)
    server = Server("127.0.0.1:9")
    monkeypatch.setattr(server, "post", lambda path, data: {"prompt_id": "p"})
    monkeypatch.setattr(server, "get", lambda path: {})
    run = server.run(flow(), lambda node, what: None)
    assert (run.status, run.reason) == ("interrupted", "it was taken out of the server's queue")
