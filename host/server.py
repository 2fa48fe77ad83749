"""Talk to ComfyUI's server: which prompt is running, and telling the browser what happened."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import uuid
from typing import Any
from weakref import WeakValueDictionary

from .runs import RUNS, RunInfo

log = logging.getLogger("attune")
EVENT = "attune.status"
_METADATA = "attune"  # in the metadata of what is saved


class _Metadata(dict[str, Any]):
    """A prompt's `extra_pnginfo`, of which a weak reference may be kept."""


# By prompt id, for as long as the host keeps them: what the nodes of a prompt write into the files that they save.
_metadata: WeakValueDictionary[str, _Metadata] = WeakValueDictionary()


def server_instance() -> Any:
    """The running PromptServer, or None where ComfyUI is used as a library."""
    module = sys.modules.get("server")  # importing it would start half of ComfyUI where there is no server
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def _executing() -> tuple[str | None, str | None]:
    """(prompt id, node id) of what is being executed, each None where it cannot be known."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        server = server_instance()
        return getattr(server, "last_prompt_id", None), getattr(server, "last_node_id", None)
    context = get_executing_context()
    return (context.prompt_id, context.node_id) if context else (None, None)


def _running(server: Any, prompt_id: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(API prompt, what came along with it) of the prompt that is being executed; both empty where it is not found."""
    for item in list(server.prompt_queue.currently_running.values()):
        if item[1] == prompt_id:
            return item[2], item[3]
    return {}, {}


def _number(prompt: dict[str, Any], value: Any) -> int:
    """An input that is a number, or is linked to a node that holds one as `value`; 0 where neither is so."""
    if isinstance(value, list) and value and str(value[0]) in prompt:
        value = prompt[str(value[0])].get("inputs", {}).get("value")
    return value if isinstance(value, int) else 0


def ancestors(prompt: dict[str, Any], node: str, through: str | None = None) -> set[str]:
    """Ids of the nodes that lead to `node` in an API prompt, through one of its inputs or any."""
    found: set[str] = set()
    inputs = prompt.get(node, {}).get("inputs", {})
    waiting = [value for name, value in inputs.items() if through in (None, name)]
    while waiting:
        link = waiting.pop()
        if isinstance(link, list) and len(link) == 2 and str(link[0]) in prompt and str(link[0]) not in found:
            found.add(str(link[0]))
            waiting += prompt[str(link[0])].get("inputs", {}).values()
    return found


def made_by(prompt: dict[str, Any], node: str) -> str:
    """A fingerprint of a node and all that leads to it, ids included; "" where the prompt does not hold it."""
    if node not in prompt:
        return ""
    parts = [
        [one, prompt[one].get("class_type"), prompt[one].get("inputs")]
        for one in sorted({node, *ancestors(prompt, node)})
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def running_prompt() -> tuple[str | None, dict[str, Any]]:
    """(id, API prompt) of what is being executed; None and empty where it cannot be told."""
    server, (prompt_id, _node) = server_instance(), _executing()
    return prompt_id, _running(server, prompt_id)[0] if server is not None else {}


def prompt_context() -> dict[str, Any]:
    """Where in the host a sampling run happens: prompt, workflow, client and sampler node, each None if unknown.

    `steps` is what the sampler node says, the number of the whole sampling also in one stage of it; 0 if unknown.
    `first_step` is where in it this stage begins, by the same node. The browser puts the workflow's id into the
    prompt's metadata.
    """
    about: dict[str, Any] = dict.fromkeys(("prompt_id", "workflow_id", "client_id", "sampler_node"))
    about |= {"steps": 0, "first_step": 0, "made_by": ""}
    try:
        about["prompt_id"], about["sampler_node"] = _executing()
        server = server_instance()
        if server is not None:
            about["client_id"] = server.client_id
            prompt, extra = _running(server, about["prompt_id"])
            about["workflow_id"] = ((extra.get("extra_pnginfo") or {}).get("workflow") or {}).get("id")
            sampler = prompt.get(about["sampler_node"] or "", {})
            about["steps"] = _number(prompt, sampler.get("inputs", {}).get("steps"))
            about["first_step"] = _number(prompt, sampler.get("inputs", {}).get("start_at_step"))
            about["made_by"] = made_by(prompt, about["sampler_node"] or "")
    except Exception:  # nobody's sampling run may fail because of this
        log.debug("The running prompt could not be told", exc_info=True)
    return about


def prompt_runs() -> bool:
    """Is a prompt being executed, or about to be?"""
    server = server_instance()
    return server is not None and server.prompt_queue.get_tasks_remaining() > 0


def say_on_node(text: str) -> None:
    """Show a line on the node that is being executed, while it is; newer hosts can."""
    server, (_prompt, node) = server_instance(), _executing()
    if node is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node)


def _watch_prompt(data: dict[str, Any]) -> dict[str, Any]:
    """A prompt comes in: keep hold of the metadata that its nodes will write. Without any it stays without."""
    extra = data.get("extra_data")
    if isinstance(extra, dict) and isinstance(extra.get("extra_pnginfo"), dict):
        extra["extra_pnginfo"] = _Metadata(extra["extra_pnginfo"])
        data["prompt_id"] = data.get("prompt_id") or str(uuid.uuid4())  # as the host does afterwards
        _metadata[str(data["prompt_id"])] = extra["extra_pnginfo"]
    return data


def watch_prompts() -> None:
    """Let what is saved tell which kernels ran, unless the user wants no metadata.

    The host hands nodes the `extra_pnginfo` that came with the prompt, but what it shows of a running prompt is a copy.
    """
    from comfy.cli_args import args as launch

    server = server_instance()
    if hasattr(server, "add_on_prompt_handler") and not launch.disable_metadata:
        server.add_on_prompt_handler(_watch_prompt)


def _sign(run: RunInfo) -> None:
    """Put what this prompt's runs were into the metadata of what it saves from now on."""
    metadata = _metadata.get(run.prompt_id or "")
    if metadata is not None:
        metadata[_METADATA] = {"runs": [one.summary() for one in RUNS.of_prompt(run.prompt_id)]}


def send_run(run: RunInfo) -> None:
    """A run has ended: keep it on disk, sign what is saved, and tell the browser that queued the prompt."""
    from .process import machine  # only now: it needs this module
    from .run_files import save

    run.close()
    save(run, machine())
    _sign(run)
    server = server_instance()
    if server is not None and run.client_id is not None:
        server.send_sync(EVENT, run.as_dict(), run.client_id)
