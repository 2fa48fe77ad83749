"""`attune bench --workflow`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_DEFAULT_SERVER = "http://127.0.0.1:8188"
_DEFAULT_KERNELS = "host,sdpa,auto"
# Options of bench that speak of single calls: with a workflow they mean nothing, and the other way round.
_OF_CALLS = ("shapes", "shape", "inputs", "memory", "dtypes", "device", "plot", "unproved", "home")
_OF_WORKFLOWS = ("frames", "size", "repeats", "server")


class UsageError(ValueError):
    """Options that do not go together, in words for the user."""


def add_workflow_options(add: Callable[..., Any]) -> None:
    """Add the options to the parser of `bench`."""
    add("--workflow", type=Path, metavar="FILE", help="time a whole workflow on a running ComfyUI, per kernel")
    add("--frames", default="", metavar="N,...", help="with --workflow: numbers of frames (what it says itself)")
    add("--size", default="", metavar="WxH", help="with --workflow: width and height (what it says itself)")
    add("--repeats", type=int, default=None, metavar="N", help="with --workflow: timed runs of each kernel (1)")
    add("--server", default="", metavar="URL", help=f"with --workflow: the running ComfyUI ({_DEFAULT_SERVER})")


def check_options(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Raises UsageError where options were given that mean nothing beside the others."""
    with_workflow = options.workflow is not None
    odd = [
        f"--{name}"
        for name in (_OF_CALLS if with_workflow else _OF_WORKFLOWS)
        if getattr(options, name) != defaults.get(name)
    ]
    if odd:
        where = "beside --workflow" if with_workflow else "without --workflow"
        raise UsageError(f"{', '.join(odd)}: means nothing {where}")


def _kernels(text: str) -> list[str]:
    from ..attention.policy import KERNEL_NAMES

    names = list(dict.fromkeys(name.strip() for name in (text or _DEFAULT_KERNELS).split(",") if name.strip()))
    if unknown := [name for name in names if name not in KERNEL_NAMES]:
        raise UsageError(f"unknown kernel {', '.join(unknown)}; known are: {', '.join(KERNEL_NAMES)}")
    # The baseline is the host's own attention, and comes first, unless it stands elsewhere in the list.
    return names if "host" in names else ["host", *names]


def _frames(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if text and (not found or min(found) < 1):
        raise UsageError(f"--frames {text}: wanted whole numbers above 0 with commas between, as 25,49,81")
    return list(dict.fromkeys(found))


def _size(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    found = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    if found is None:
        raise UsageError(f"--size {text}: wanted width x height, as 832x1216")
    return int(found[1]), int(found[2])


def bench_workflow(
    options: argparse.Namespace, progress: Callable[[int, int, str], None], write: Callable[..., int]
) -> int:
    """Run `attune bench --workflow`; returns the exit status."""
    from .workflow_bench import Plan, WorkflowBench
    from .workflow_convert import to_api
    from .workflow_file import WorkflowError, is_ui, read_workflow
    from .workflow_graph import SELECTOR, prepare, require_pack
    from .workflow_result import as_csv
    from .workflow_server import RejectedError, Server, ServerError
    from .workflow_table import workflow_table

    server = Server(options.server or _DEFAULT_SERVER)
    try:
        kernels, frames = _kernels(options.kernels), _frames(options.frames)
        size, repeats = _size(options.size), 1 if options.repeats is None else options.repeats
        if repeats < 1:
            raise UsageError(f"--repeats {repeats}: wanted 1 or more")
        workflow = read_workflow(options.workflow)
        info = server.get("/object_info")
        require_pack(info)
        job = prepare(to_api(workflow, info, switch_on=[SELECTOR]) if is_ui(workflow) else workflow, info)
        for one in frames:
            job.check_frames(one)
        if size and not job.sizes:
            raise UsageError("--size: no node of the workflow has a width and a height to set")
        plan = Plan(options.workflow.stem, kernels, frames or [None], repeats, size)
        server.open()
    except (UsageError, WorkflowError, ServerError, OSError) as error:
        print(f"attune bench: {error}", file=sys.stderr)
        return 2

    def said(text: str) -> None:
        _clear()
        print(text, file=sys.stderr, flush=True)

    try:
        result = WorkflowBench(server, job, plan, progress, said).run()
    except (RejectedError, WorkflowError, ServerError) as error:
        _clear()
        what = "the server does not accept the workflow: " if isinstance(error, RejectedError) else ""
        print(f"attune bench: {what}{error}", file=sys.stderr)
        return 2
    finally:
        server.close()
    _clear()
    result["options"] = {
        "kernels": kernels,
        "frames": frames,
        "size": options.size,
        "repeats": repeats,
    }
    status = write(options, result, as_csv)  # first: what reads the text may be gone, as `head` is
    print(workflow_table(result))
    if result["interrupted"] == "Ctrl+C":
        return 130
    measured = any(row["status"] == "measured" for row in result["rows"])
    return status if measured and not result["interrupted"] else 1


def _clear() -> None:
    """Take the progress bar away."""
    if sys.stderr.isatty():
        print(f"\r{'':<99}\r", end="", file=sys.stderr)
