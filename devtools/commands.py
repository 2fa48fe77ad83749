"""The commands of dev.py and what they have in common."""

import argparse
import os
import signal
import sys
from pathlib import Path

from . import CACHE, ROOT, VENV, comfyui, parts
from .say import Stop
from .venv import Part, Venv, require_python

WORKFLOW = ROOT / "workflows" / "wan2.2_i2v_14b.json"
USAGE = """\
python3 dev.py demo [--serve] [--port N] [--workflow FILE] [--break KIND]
       python3 dev.py test [--browser] [--no-comfyui] [--comfyui VERSION …] [--diffusers VERSION]
                           [pytest arguments]"""


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code. A Stop is printed as the one sentence it is."""
    os.environ["PYTHONUTF8"] = "1"  # Every child process reads and writes UTF-8, on Windows too.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # A Windows console may lack letters of a path.
    for name in (signal.SIGINT, signal.SIGTERM):  # SIGTERM ends the children too; SIGINT is off in background jobs.
        signal.signal(name, signal.default_int_handler)
    parser = argparse.ArgumentParser("dev.py", usage=USAGE, description="Set up this checkout, and try or test it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | test")
    demo = commands.add_parser("demo", help="run a Wan 2.2 workflow with tiny models in a real ComfyUI")
    demo.add_argument(
        "--serve", action="store_true", help="leave the server up, also with --break, and print its address"
    )
    demo.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    demo.add_argument(
        "--break", dest="broken", choices=("nan", "inf", "error", "raise"), default="",
        help="let a stand-in kernel go wrong half-way: the video has to be clean all the same",
    )  # fmt: skip
    demo.add_argument("--workflow", type=Path, default=WORKFLOW, help="UI file to run")
    test = commands.add_parser("test", help="run the tests; further arguments go to pytest", allow_abbrev=False)
    test.add_argument("--browser", action="store_true", help="install Debian's chromium when no browser is there")
    test.add_argument("--no-comfyui", action="store_true", help="only what needs neither ComfyUI nor a GPU")
    test.add_argument(
        "--diffusers", default="", metavar="VERSION",
        help="only the tests of diffusers pipelines, with this version of diffusers beside the installed one",
    )  # fmt: skip
    test.add_argument(
        "--comfyui", action="append", default=[], metavar="VERSION",
        help=f"only the tests in a ComfyUI, with this one; may be given often ({', '.join(comfyui.RELEASES)})",
    )  # fmt: skip
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command != "test":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        if known.command == "demo":
            from .demo import demo as run

            return run(known.workflow, known.port, known.serve, known.broken)
        from .suite import suite as run

        return run(rest, known.browser, not known.no_comfyui, known.diffusers, known.comfyui)
    except Stop as stop:
        print(f"dev.py: {stop}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndev.py: stopped; run the same command again to go on where it was.", file=sys.stderr)
        return 130


def set_up(extra: list[Part], with_comfyui: bool = True) -> tuple[Venv, Path | None]:
    """Make .venv and ComfyUI ready. Returns the environment and the folder of ComfyUI. Raises Stop."""
    folder = comfyui.locate() if with_comfyui else None
    venv = Venv(VENV, CACHE)
    if not venv.python.exists():
        require_python()
    venv.prepare([parts.TORCH])
    if with_comfyui:
        folder = comfyui.obtain(venv)
        venv.prepare([parts.comfyui(folder)])
    venv.prepare(extra)
    return venv, folder
