"""dev.py test: the same set-up as the demo, then pytest in .venv; parts of it again for older diffusers and hosts."""

import os
import subprocess
from collections.abc import Sequence

from . import ROOT, chrome, comfyui, older, parts
from .commands import set_up
from .say import step
from .venv import Venv

# The oldest ComfyUI that the pack is for and one between; the newest is what everything else runs in. What a test file
# of these finds in a host depends most on its version.
HOSTS = ("0.16.3", "0.24.1")
HOST_TESTS = [f"tests/{name}.py" for name in ("test_nodes", "test_release_node")]


def suite(
    arguments: list[str], browser: bool, with_comfyui: bool, diffusers: str = "", hosts: Sequence[str] = ()
) -> int:
    """Run the test suite; returns pytest's exit code. Raises Stop.

    diffusers: run only the tests of pipelines, with that version of it. hosts: only the tests in a ComfyUI, in these
    versions of it.
    """
    if browser:
        chrome.install()
    venv, _ = set_up([parts.tests()], with_comfyui)
    options = [] if with_comfyui else ["--no-comfyui"]
    # The whole suite on two workers, file by file: while one waits for its ComfyUI, the other computes.
    workers = ["-n", "2", "--dist", "loadfile"] if not arguments and (os.cpu_count() or 1) > 1 else []
    if diffusers:
        return _older(venv, diffusers, [*workers, *options, *arguments])
    if hosts:
        return max(_in_host(venv, host, arguments or [*workers, "-m", "comfyui and not browser"]) for host in hosts)
    code = _pytest(venv, [*workers, *options, *arguments], dict(os.environ))
    if arguments or code not in (0, 1):  # 1: tests failed; anything else is no result
        return code
    codes = [code, _older(venv, older.OLDEST, [*workers, *options], whole=False)]
    if with_comfyui and not os.environ.get("COMFYUI_PATH"):  # else: the user's own and no other
        codes += [_in_host(venv, host, [*workers, *HOST_TESTS]) for host in HOSTS]
    return max(codes)


def _in_host(venv: Venv, version: str, arguments: list[str]) -> int:
    """Tests in another ComfyUI, on the packages that the newest one wants."""
    folder = comfyui.obtain(venv, version=version)
    step(f"In ComfyUI {version}")
    return _pytest(venv, arguments, {**os.environ, "COMFYUI_PATH": str(folder)})


def _older(venv: Venv, version: str, arguments: list[str], whole: bool = True) -> int:
    """The tests of pipelines with another diffusers; not `whole`: without the slow ones."""
    folder = older.obtain(venv, version)
    step(f"With diffusers {version}")
    return _pytest(venv, [*older.tests(whole), *arguments], older.environment(folder))


def _pytest(venv: Venv, arguments: list[str], environment: dict[str, str]) -> int:
    command = [str(venv.python), "-m", "pytest", *arguments]
    step("Running " + " ".join(command[2:]))
    process = subprocess.Popen(command, cwd=ROOT, env={**environment, "DO_NOT_TRACK": "1"})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # pytest was interrupted too: let it take its fixtures down and say what it found.
