"""dev.py test: the same set-up as the demo, then pytest in .venv."""

import os
import subprocess

from . import ROOT, chrome, parts
from .commands import set_up
from .say import step


def suite(arguments: list[str], browser: bool, with_comfyui: bool) -> int:
    """Run the test suite; returns pytest's exit code. Raises Stop."""
    if browser:
        chrome.install()
    venv, _ = set_up([parts.tests()], with_comfyui)
    # The whole suite on two workers, file by file: while one waits for its ComfyUI, the other computes.
    workers = ["-n", "2", "--dist", "loadfile"] if not arguments and (os.cpu_count() or 1) > 1 else []
    command = [str(venv.python), "-m", "pytest", *workers, *([] if with_comfyui else ["--no-comfyui"]), *arguments]
    step("Running " + " ".join(command[2:]))
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "DO_NOT_TRACK": "1"})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # pytest was interrupted too: let it take its fixtures down and say what it found.
