"""The command `attune report`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .run_text import NotARunError, read_run, runs_text


def _last(folder: Path) -> list[dict[str, Any]]:
    """The runs of the prompt that was sampled last, in order; files that are none are passed over."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json"), reverse=True):
        try:
            run = read_run(path)
        except (NotARunError, OSError):
            continue
        if found and (run["prompt_id"] is None or run["prompt_id"] != found[0]["prompt_id"]):
            break
        found.insert(0, run)
    return found


def _save_picture(runs: list[dict[str, Any]], path: Path) -> None:
    from PIL import Image

    from .run_picture import picture

    Image.fromarray(picture(runs)).save(path)


def _report(options: argparse.Namespace) -> int:
    folder = options.runs(options.home.absolute() if options.home else None)
    try:
        runs = [read_run(options.file)] if options.file else _last(folder)
        text = runs_text(runs)
    except (NotARunError, OSError) as error:
        print(f"attune report: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        print(f"attune report: {options.file or folder} is damaged: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if not runs:
        print(f"There is no record of a run in {folder}: sample a model with one of the pack's nodes on it first.")
        return 1
    if options.picture:
        try:
            _save_picture(runs, options.picture)
        except (OSError, ValueError, ImportError) as error:
            print(f"{options.picture} could not be written ({error})", file=sys.stderr)
            return 1
    if options.json:
        json.dump(runs, sys.stdout, indent=2)
        print()
    else:
        print(text)
    return 0


def add_report(commands: Any, runs: Callable[[Path | None], Path]) -> None:
    """Add `report` to the parser's commands. `runs(home)` is the folder with the files, None: where ComfyUI has it."""
    about = "what ran in a sampling run: kernels, steps and blocks, errors, and what did not go as planned"
    parser = commands.add_parser("report", help=about, description=about)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the record of a run")
    which.add_argument("--last", action="store_true", help="the runs of the last prompt (as without FILE)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of runs")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also save the picture (.png)")
    parser.add_argument(
        "--home", type=Path, help="the folder of the pack's state, where ComfyUI has another user directory"
    )
    parser.set_defaults(run=_report, runs=runs)
