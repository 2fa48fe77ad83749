"""dev.py demo: a Wan 2.2 workflow with tiny models, from its UI file to a video, in a real ComfyUI."""

import contextlib
import json
import subprocess
import time
import urllib.error
import uuid
from pathlib import Path

from . import CACHE, ROOT, comfyui, report, small
from .commands import set_up
from .host import Host, require_port
from .say import Bar, Stop, note, step
from .shrink import shrink
from .venv import Venv

SCRIPTS = ROOT / "devtools" / "venv_scripts"
DEVICE_PROBE = (
    "import torch as t; print(t.cuda.is_available() or t.xpu.is_available() or t.backends.mps.is_available())"
)


def demo(workflow: Path, port: int, serve: bool, broken: str = "") -> int:
    """Run the demo; returns the exit code. Raises Stop.

    serve: leave ComfyUI running until it is stopped. broken: how a kernel is to go wrong half-way (broken.py), or "".
    """
    try:
        ui = json.loads(workflow.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Stop(f"{workflow} cannot be read ({error}): wanted a UI workflow as ComfyUI saves it.") from None
    if port:
        require_port(port)
    venv, folder = set_up([])
    step("Making the tiny models and pictures that the workflow names (random weights, official names)")
    base = comfyui.make_base(CACHE / "demo", CACHE / "models")
    names = sorted({name for name in _strings(ui) if name.endswith(".safetensors") and not set(name) & set("/\n ")})
    script(venv, ROOT / "tests" / "tiny_models.py", folder, CACHE / "models", *names)
    script(venv, SCRIPTS / "make_inputs.py", base / "input", workflow.absolute())
    on_cpu = script(venv, "-c", DEVICE_PROBE).strip() != "True"
    flags = ["--cpu"] if on_cpu else []
    if broken:
        from .broken import broken_demo

        def server(env: dict[str, str]) -> Host:
            return Host(venv.python, folder, base, flags, port, env=env)

        return broken_demo(broken, venv, ui, base, server, on_cpu, serve)
    host = Host(venv.python, folder, base, flags, port)
    step(f"Starting ComfyUI {'on the CPU ' if on_cpu else ''}at {host.url}")
    try:
        host.start()
        prompt = make_prompt(venv, host, ui, base, on_cpu)
        history = run_prompt(venv, host, prompt, ui)
        print()
        report.machine(host.get("/system_stats"))
        report.kernels(host.get("/attune/kernels")["kernels"])
        report.calls(runs_of(host, history["prompt"][1]), prompt)
        report.video(history, base)
        if serve:
            note(f"Open {host.url} and there {small.where(base, on_cpu)}. Ctrl+C ends it.")
        print("demo: ok", flush=True)
        if serve:
            wait_for_the_user(host)
    finally:
        host.stop()
    return 0


def _strings(value):
    """All strings in a JSON value, the names of models among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def script(venv: Venv, *command) -> str:
    """Run a script with the Python of .venv and return what it printed. Raises Stop with its last line."""
    arguments = [str(venv.python), *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise Stop(f"{Path(command[0]).name} failed: {last}")
    return done.stdout


def make_prompt(venv: Venv, host: Host, ui: dict, base: Path, on_cpu: bool) -> dict:
    """The API prompt for the UI workflow, on a CPU with smaller sizes, and then saved as small.save() does."""
    prompt = convert(venv, host, ui, base)
    if not on_cpu:
        return prompt
    lowered, said = shrink(prompt, small.CPU_SIZE, small.CPU_LENGTH, small.CPU_STEPS)
    note("lowered in the prompt for a CPU, the file stays as it is: " + ("; ".join(said) or "nothing"))
    small.save(base, ui, prompt, lowered)
    return lowered


def convert(venv: Venv, host: Host, ui: dict, base: Path) -> dict:
    """The API prompt for the UI workflow, as the front end would send it."""
    step("Converting the workflow to the prompt that the front end would send")
    workflow, object_info = base / "workflow.json", base / "object_info.json"
    workflow.write_text(json.dumps(ui), "utf-8")
    known = host.get("/object_info")
    if "AttentionSelector" not in known:
        said = [line for line in host.output().splitlines() if "ComfyUI-Attune" in line and " seconds" not in line]
        raise Stop(f"ComfyUI could not load this pack: {(said or ['it does not say why'])[0]} (all of it: {host.log}).")
    object_info.write_text(json.dumps(known), "utf-8")
    return json.loads(script(venv, SCRIPTS / "convert.py", workflow, object_info))


def run_prompt(venv: Venv, host: Host, prompt: dict, ui: dict) -> dict:
    """Queue the prompt and follow it; returns its history entry. Raises Stop."""
    client = uuid.uuid4().hex
    watch = subprocess.Popen(
        [str(venv.python), str(SCRIPTS / "watch.py"), host.url, client],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
    )  # fmt: skip
    bar, done = Bar(""), set()
    try:
        watch.stdout.readline()  # The first message says that the socket is open.
        step("Running it")
        body = {"prompt": prompt, "client_id": client, "extra_data": {"extra_pnginfo": {"workflow": ui}}}
        try:
            prompt_id = host.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Stop(f"ComfyUI did not accept the prompt: {error.read().decode('utf-8', 'replace')[:2000]}") from None
        for line in watch.stdout:
            message = json.loads(line)
            kind, data = message["type"], message.get("data", {})
            node = data.get("node")
            if kind == "execution_cached":
                done.update(data["nodes"])
            elif kind in ("progress", "executing") and node in prompt:
                part = data["value"] / data["max"] if kind == "progress" else 0
                steps = f", step {data['value']} of {data['max']}" if kind == "progress" else ""
                bar.label = f"{prompt[node]['class_type']} ({node}){steps}"
                bar.show(len(done - {node}) + part, len(prompt))
                done.add(node)
            elif kind == "execution_error":
                raise Stop(f"{data['node_type']} (node {data['node_id']}) failed: {data['exception_message'].strip()}")
            elif kind == "execution_success":
                bar.show(len(prompt), len(prompt))
                break
            elif kind == "execution_interrupted":
                break
    finally:
        bar.close()
        watch.kill()
        watch.communicate()
    return _history(host, prompt_id)


def _history(host: Host, prompt_id: str) -> dict:
    """The history entry of a prompt that succeeded; the server writes it a moment after it said so. Raises Stop."""
    for _ in range(100):
        if entry := host.get(f"/history/{prompt_id}").get(prompt_id):
            if entry["status"]["status_str"] == "success":
                return entry
            break
        time.sleep(0.1)
    raise Stop(f"The run ended without a result; look into {host.log}.")


def runs_of(host: Host, prompt_id: str) -> list[dict]:
    """The records of this prompt's sampling runs. Raises Stop when the pack keeps none."""
    try:
        runs = [run for run in host.get("/attune/runs")["runs"] if run["prompt_id"] == prompt_id]
    except urllib.error.HTTPError as error:
        raise Stop(f"GET /attune/runs answered {error.code}: the pack did not load; look into {host.log}.") from None
    if not runs:
        raise Stop(f"The pack recorded no sampling run for this prompt; look into {host.log}.")
    return runs


def wait_for_the_user(host: Host) -> None:
    """Wait for Ctrl+C. Raises Stop when ComfyUI ends by itself."""
    with contextlib.suppress(OSError):  # or the demo's own prompt, run once more, would come from ComfyUI's cache
        host.post("/free", {"free_memory": True})
    try:
        code = host.process.wait()
    except KeyboardInterrupt:
        note("stopped")
        return
    raise Stop(f"ComfyUI ended by itself with exit code {code}; look into {host.log}.")
