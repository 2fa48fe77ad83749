"""dev.py demo --break: a stand-in kernel goes wrong half-way through a real run, and the video has to be clean."""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from . import CACHE, ROOT, report, small
from .demo import SCRIPTS, make_prompt, run_prompt, runs_of, script, wait_for_the_user
from .host import Host
from .say import Stop, note, step
from .venv import Venv

KERNEL = "sage2_fp8_cuda"  # the name under which the stand-in runs
KINDS = {"nan": "nan", "inf": "inf_row", "error": "error=0.5", "raise": "raise"}
STANDINS = ROOT / "tests" / "standins"
# Of 255, mean over a frame. Before it breaks the kernel rounds to float16; noise is made of that by tiny models.
CLEAN = 8.0


def broken_demo(
    kind: str, venv: Venv, ui: dict, base: Path, server: Callable[[dict[str, str]], Host], on_cpu: bool, serve: bool
) -> int:
    """Run the workflow twice, on the host's own attention and with the kernel that breaks; returns the exit code.

    `server` makes a host with these environment variables. serve: leave the second one running until it is stopped.
    Raises Stop, also where the two videos are not alike.
    """
    home = CACHE / "demo-broken"
    _forget(home)  # of an earlier demo
    environment = {
        "ATTUNE_HOME": str(home),
        "ATTUNE_EXTRA_KERNELS": str(STANDINS / "extra_kernels.py"),
        "ATTUNE_STANDIN_SM": "89",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(STANDINS / "sage2"), os.environ.get("PYTHONPATH", "")])),
    }
    step("Running the workflow on ComfyUI's own attention, to have something to compare with")
    with _started(server(environment), on_cpu) as host:
        clean, calls = _once(venv, ui, base, host, on_cpu, "host")
    half = sum(calls.values()) // 2
    step(f"Running it with a stand-in for {KERNEL} that goes wrong ({kind}) from call {half} of {2 * half} on")
    fault = {"ATTUNE_STANDIN_FAULT": f"{KERNEL}:{KINDS[kind]}:from={half}", "ATTUNE_STANDIN_FAULT_IN": "server"}
    with _started(server({**environment, **fault}), on_cpu) as host:
        broken, ran = _once(venv, ui, base, host, on_cpu, KERNEL)
        if not ran.get(KERNEL):
            raise Stop(f"{KERNEL} did not compute a single call of the second run: there was nothing that could break.")
        step("What happened")
        print(_report(venv, home))
        found = json.loads(script(venv, SCRIPTS / "compare_videos.py", clean, broken))
        apart = found["difference"]
        note(f"the two videos: {found['frames']} frames, at most {apart:.2f} of 255 apart (mean over a frame)")
        if apart > CLEAN or not found["frames"]:
            raise Stop(f"The video of the broken kernel is not clean: {broken} differs from {clean}.")
        if serve:
            _forget(home)
            _say_what_to_try(kind, host, small.where(base, on_cpu))
        print("demo: ok", flush=True)
        if serve:
            wait_for_the_user(host)
    return 0


def _forget(home: Path) -> None:
    """Forget what runs found against the kernel: it would not be called again. A run reads it when it begins."""
    (home / "failures.json").unlink(missing_ok=True)


def _say_what_to_try(kind: str, host: Host, where: str) -> None:
    step(f"Now see it yourself: ComfyUI still runs, and every call of {KERNEL} in it goes wrong ({kind})")
    if kind == "raise":
        what = "Each call that raises"
        later = ["3. Run again: it is called again and raises again, because what it raises holds for one run only."]
    else:
        what = "The step"
        later = [
            f'3. In that tab, "This machine" says what {KERNEL} did. The verdict of the',
            '   doctor on it stays "works": in a child process it is right, the stand-in breaks only in ComfyUI.',
            '   Run again: it is not called any more. "Probe again" gives it a new chance, and it breaks again.',
        ]
    for line in (
        f"1. Open {host.url} and there {where}.",
        f"2. Choose {KERNEL} as the kernel of every Attention Selector, and press Run.",
        f"   {what} is computed again on ComfyUI's own attention, so that the video is clean; the node says",
        "   what ran and why not what you chose. The map in the tab Attention, at the left, marks where the kernel was",
        '   given up; below it the reason stands under "What did not go as planned".',
        *later,
        '4. Press "Bypass all" in that tab, and Run: no kernel is chosen any more. "Enable all" takes it back.',
        "Ctrl+C ends it.",
    ):
        note(line)


@contextlib.contextmanager
def _started(host: Host, on_cpu: bool) -> Iterator[Host]:
    step(f"Starting ComfyUI {'on the CPU ' if on_cpu else ''}at {host.url}")
    try:
        host.start()
        yield host
    finally:
        host.stop()


def _once(venv: Venv, ui: dict, base: Path, host: Host, on_cpu: bool, kernel: str) -> tuple[Path, dict[str, int]]:
    """One run with every AttentionSelector on `kernel`: (the video, calls by kernel)."""
    prompt = make_prompt(venv, host, ui, base, on_cpu)
    selectors = [node for node in prompt.values() if node["class_type"] == "AttentionSelector"]
    if not selectors:
        raise Stop("The workflow has no AttentionSelector that could be set to a kernel that breaks.")
    for node in selectors:
        node["inputs"]["kernel"] = kernel
    history = run_prompt(venv, host, prompt, ui)
    print()
    runs = runs_of(host, history["prompt"][1])
    report.calls(runs, prompt)
    videos = report.video(history, base)
    calls: dict[str, int] = {}
    for run in runs:
        for name, count in run["observed"].items():
            calls[name] = calls.get(name, 0) + count
    return videos[0], calls


def _report(venv: Venv, home: Path) -> str:
    """What `attune report --last` says. Raises Stop."""
    command = [str(venv.python), str(ROOT), "report", "--last"]
    env = {**os.environ, "ATTUNE_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=env)
    if done.returncode:
        raise Stop(f"There is no report of the run: {(done.stderr or done.stdout).strip()}")
    return done.stdout
