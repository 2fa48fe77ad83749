"""Talk to ComfyUI's server: which prompt is running, and telling the browser what happened."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from .runs import RUNS, RunInfo

log = logging.getLogger("attune")
EVENT = "attune.status"


def _server() -> Any:
    """The running PromptServer, or None where ComfyUI is used as a library."""
    module = sys.modules.get("server")  # importing it would start half of ComfyUI where there is no server
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def _executing() -> tuple[str | None, str | None]:
    """(prompt id, node id) of what is being executed, each None where it cannot be known."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        server = _server()
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


def prompt_context() -> dict[str, Any]:
    """Where in the host a sampling run happens: prompt, workflow, client and sampler node, each None if unknown.

    `steps` is what the sampler node says, the number of the whole sampling also in one stage of it; 0 if unknown. The
    browser puts the workflow's id into the prompt's metadata.
    """
    about: dict[str, Any] = dict.fromkeys(("prompt_id", "workflow_id", "client_id", "sampler_node"))
    about["steps"] = 0
    try:
        about["prompt_id"], about["sampler_node"] = _executing()
        server = _server()
        if server is not None:
            about["client_id"] = server.client_id
            prompt, extra = _running(server, about["prompt_id"])
            about["workflow_id"] = ((extra.get("extra_pnginfo") or {}).get("workflow") or {}).get("id")
            sampler = prompt.get(about["sampler_node"] or "", {})
            about["steps"] = _number(prompt, sampler.get("inputs", {}).get("steps"))
    except Exception:  # nobody's sampling run may fail because of this
        log.debug("The running prompt could not be told", exc_info=True)
    return about


def send_run(run: RunInfo) -> None:
    """Tell the browser that queued the prompt what ran in this sampling run."""
    server = _server()
    if server is not None and run.client_id is not None:
        server.send_sync(EVENT, run.as_dict(), run.client_id)


def add_routes(list_kernels: Callable[[], list[dict[str, Any]]], default: Callable[[], dict[str, Any]]) -> None:
    """The pack's read-only routes.

    `GET /attune/runs`: the last runs, for a browser that was not there when they ended. `GET /attune/kernels`: every
    kernel in this ComfyUI, and whether it can run here. `GET /attune/default`: what the environment's default did.
    """
    server = _server()
    if server is None or not hasattr(server, "routes"):
        return
    from aiohttp import web

    @server.routes.get("/attune/kernels")
    async def kernels(_request: web.Request) -> web.Response:
        return web.json_response({"kernels": list_kernels()})

    @server.routes.get("/attune/default")
    async def environment(_request: web.Request) -> web.Response:
        return web.json_response(default())

    @server.routes.get("/attune/runs")
    async def runs(_request: web.Request) -> web.Response:
        return web.json_response({"runs": RUNS.as_list()})
