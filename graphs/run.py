"""`attune workflow run`: a workflow sent to a running ComfyUI, and what became of it."""

from __future__ import annotations

import sys
from typing import Any

from ..measure.workflow_convert import to_api
from ..measure.workflow_file import Prompt
from ..measure.workflow_server import RejectedError, Run, Server, ServerError
from .api import ApiBook
from .check import check
from .files import Document, read
from .text import say


class _WithWorkflow(Server):
    """Sends the saved workflow along, as the front end does, so that what is saved carries it."""

    workflow: Any = None

    def post(self, path: str, data: Any) -> Any:
        if path == "/prompt" and self.workflow is not None:
            data = {**data, "extra_data": {"extra_pnginfo": {"workflow": self.workflow}}}
        return super().post(path, data)


def _told(titles: dict[str, str], node: str, what: str) -> None:
    text = f"{titles.get(node, node)}{f': {what}' if what else ''}"
    if sys.stderr.isatty():
        print(f"\r{text:<79.79}", end="", file=sys.stderr, flush=True)
    elif not what:
        say(text, sys.stderr)


def _files(run: Run) -> list[str]:
    """What was written, as the server names it."""
    found = []
    for output in run.outputs.values():
        for entries in output.values():
            for one in entries if isinstance(entries, list) else []:
                if isinstance(one, dict) and one.get("filename"):
                    found.append("/".join(str(one[key]) for key in ("type", "subfolder", "filename") if one.get(key)))
    return found


def _ran(server: Server, prompt_id: str, titles: dict[str, str]) -> list[str]:
    """What ran of attention in each sampler, where the server has this pack; nothing for models without its nodes."""
    lines = []
    try:
        for one in server.get("/attune/runs")["runs"]:
            if one["prompt_id"] == prompt_id:
                ran = ", ".join(f"{kernel} ×{calls:,}" for kernel, calls in one["observed"].items())
                wanted = ", ".join(dict.fromkeys(str(node["requested"]) for node in one["nodes"].values()))
                sampler = titles.get(str(one["sampler_node"]), one["sampler_node"])
                lines.append(f"{sampler}: ran {ran or 'none of the pack'} (asked for: {wanted or 'nothing'})")
    except (ServerError, KeyError, TypeError, ValueError, AttributeError):
        return []  # a server without the pack, or with another version of it
    return lines


def run(document: Document, url: str) -> int:
    """Run it; returns the exit status. Raises WorkflowError, ServerError."""
    server = _WithWorkflow(url)
    shown = read(document.path) if document.medium else document
    if not shown.api:
        check(shown.workflow)
        server.workflow = shown.workflow
    if not document.api:
        check(document.workflow)
    else:
        ApiBook(document.workflow)
    info = server.get("/object_info")
    if not (isinstance(info, dict) and all(isinstance(node, dict) for node in info.values()) and "KSampler" in info):
        raise ServerError(
            f"{server.url} is no ComfyUI: wanted its list of nodes at /object_info, found something else; look at the "
            "address"
        )
    prompt: Prompt = document.workflow if document.api else to_api(document.workflow, info)
    if not prompt:
        say("attune workflow: nothing would run: every node is bypassed or muted", sys.stderr)
        return 2
    titles = {key: f"{node['class_type']} ({key})" for key, node in prompt.items()}
    server.open()
    try:
        done = server.run(prompt, lambda node, what: _told(titles, node, what))
    except RejectedError as error:
        say(f"attune workflow: {url} does not accept the workflow: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("attune workflow: stopped, and taken from the server's queue", sys.stderr)
        return 130
    finally:
        server.close()
        if sys.stderr.isatty():
            print(f"\r{'':<79}\r", end="", file=sys.stderr)
    if done.refused:
        say(f"attune workflow: a part was not run: {done.refused}", sys.stderr)
    if done.status == "interrupted" and not done.reason:
        done.reason = "somebody stopped it at the server"
    say(f"{done.status} after {done.seconds:.1f} s{f': {done.reason}' if done.reason else ''}")
    for line in [*_files(done), *_ran(server, done.prompt_id, titles)]:
        say(line)
    return 0 if done.status == "success" and not done.refused else 1
