"""Talk to ComfyUI's server: which prompt is running, and telling the browser what happened."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .runs import RUNS, RunInfo

log = logging.getLogger("attune")
EVENT = "attune.status"


def _server() -> Any:
    """The running PromptServer, or None where ComfyUI is used as a library."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


def _executing() -> tuple[str | None, str | None]:
    """(prompt id, node id) of what is being executed, each None where it cannot be known."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        server = _server()
        return getattr(server, "last_prompt_id", None), getattr(server, "last_node_id", None)
    context = get_executing_context()
    return (context.prompt_id, context.node_id) if context else (None, None)


def _workflow_id(server: Any, prompt_id: str | None) -> str | None:
    """The id of the workflow that the running prompt came from; the browser puts it into the prompt's metadata."""
    for item in list(server.prompt_queue.currently_running.values()):
        if item[1] == prompt_id:
            workflow = (item[3].get("extra_pnginfo") or {}).get("workflow") or {}
            return workflow.get("id")
    return None


def prompt_context() -> dict[str, Any]:
    """Where in the host a sampling run happens: prompt, workflow, client and sampler node, each None if unknown."""
    about: dict[str, Any] = dict.fromkeys(("prompt_id", "workflow_id", "client_id", "sampler_node"))
    try:
        about["prompt_id"], about["sampler_node"] = _executing()
        server = _server()
        if server is not None:
            about["client_id"] = server.client_id
            about["workflow_id"] = _workflow_id(server, about["prompt_id"])
    except Exception:  # nobody's sampling run may fail because of this
        log.debug("The running prompt could not be told", exc_info=True)
    return about


def send_run(run: RunInfo) -> None:
    """Tell the browser that queued the prompt what ran in this sampling run."""
    server = _server()
    if server is not None and run.client_id is not None:
        server.send_sync(EVENT, run.as_dict(), run.client_id)


def add_routes(list_kernels: Callable[[], list[dict[str, Any]]]) -> None:
    """The pack's read-only routes.

    `GET /attune/runs`: the last runs, for a browser that was not there when they ended. `GET /attune/kernels`: every
    kernel in this ComfyUI, and whether it can run here.
    """
    server = _server()
    if server is None or not hasattr(server, "routes"):
        return
    from aiohttp import web

    @server.routes.get("/attune/kernels")
    async def kernels(_request: web.Request) -> web.Response:
        return web.json_response({"kernels": list_kernels()})

    @server.routes.get("/attune/runs")
    async def runs(_request: web.Request) -> web.Response:
        return web.json_response({"runs": RUNS.as_list()})
