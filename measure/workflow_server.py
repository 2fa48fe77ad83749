"""A ComfyUI server as a client sees it: prompts, and what happens to them, with the time."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .workflow_file import Prompt, WorkflowError
from .workflow_refusal import why_rejected

_HERE = {"127.0.0.1", "localhost", "::1"}
_WAIT = 20.0  # seconds for an answer
_SILENT = 20  # half seconds without a message, after which the queue is looked at


class ServerError(Exception):
    """The server is not there, or not what it should be; in words for the user."""


class RejectedError(Exception):
    """The server does not accept a prompt: a value or a node that it does not have."""


@dataclass
class Run:
    """What became of one prompt. Times in seconds, as they came in here.

    `status`: "success", "error" or "interrupted"; `reason`: why not a success. `seconds`: from the first node to the
    last. `nodes`: the time of each node that ran. `steps`: (steps, seconds per step) of nodes that tell their progress;
    the first step has no beginning that could be told from loading, so the time is that between steps, None for one.
    `outputs`: what the output nodes wrote. `refused`: what the server did not take, where it ran only a part.
    """

    prompt_id: str
    status: str = ""
    reason: str = ""
    seconds: float = 0.0
    nodes: dict[str, float] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)
    steps: dict[str, tuple[int, float | None]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


class _Watch:
    """Puts together a Run from the messages about it."""

    def __init__(self, prompt_id: str, told: Callable[[str, str], None]) -> None:
        self.run = Run(prompt_id)
        self.told = told
        self._began = self._node_began = 0.0
        self._node = ""
        self._steps: dict[str, list[tuple[int, float]]] = {}

    def take(self, at: float, kind: str, data: Mapping[str, Any]) -> bool:
        """A message that came at `at`; True when it was the last."""
        if data.get("prompt_id") != self.run.prompt_id:
            return False
        if kind == "execution_start":
            self._began = at
        elif kind == "execution_cached":
            self.run.cached.update(map(str, data["nodes"]))
        elif kind == "executing" and data.get("node") is not None:
            self._close_node(at)
            self._node, self._node_began = str(data.get("display_node") or data["node"]), at
            self.told(self._node, "")
        elif kind == "progress":
            node, value = self._node or str(data.get("node")), int(data["value"])
            self._steps.setdefault(node, []).append((value, at))
            self.told(node, f"step {value} of {int(data['max'])}")
        elif kind in ("execution_success", "execution_error", "execution_interrupted"):
            self._close_node(at)
            self.run.seconds = at - self._began
            self.run.status = kind.removeprefix("execution_")
            if kind == "execution_error":
                kind = str(data.get("exception_type") or "").rpartition(".")[2]
                said = " ".join(f"{kind and f'{kind}: '}{data.get('exception_message', '')}".split())
                self.run.reason = f"{data.get('node_type')} (node {data.get('node_id')}): {said[:500]}"
            self._close_steps()
            return True
        return False

    def _close_node(self, at: float) -> None:
        if self._node:
            self.run.nodes[self._node] = self.run.nodes.get(self._node, 0.0) + at - self._node_began
        self._node = ""

    def _close_steps(self) -> None:
        for node, seen in self._steps.items():
            (first, began), (last, ended) = seen[0], seen[-1]
            self.run.steps[node] = (last, (ended - began) / (last - first) if last > first else None)


class Server:
    """Talks to the server at `url`. `open` starts to listen to it, `close` ends that."""

    def __init__(self, url: str) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        try:
            parts = urllib.parse.urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or not self.url.isprintable() or " " in self.url:
            raise WorkflowError(
                f"{url!r} is no address of a ComfyUI: wanted http://… or https://…, as http://127.0.0.1:8188"
            )
        # A proxy that is set for the internet must not be asked for this machine.
        proxies = [urllib.request.ProxyHandler({})] if host in _HERE else []
        self._opener = urllib.request.build_opener(*proxies)
        self.client = uuid.uuid4().hex
        self._messages: queue.Queue[tuple[float, str, Any]] = queue.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def fetch(self, path: str, timeout: float = _WAIT) -> bytes:
        """GET. Raises OSError (HTTPError has .code), also where the address is no server's."""
        with self._opener.open(self.url + path, timeout=timeout) as answer:
            data: bytes = answer.read()
            return data

    def get(self, path: str) -> Any:
        """GET, as JSON. Raises ServerError."""
        try:
            return json.loads(self.fetch(path, 120))
        except urllib.error.HTTPError as error:
            wanted = "a ComfyUI with ComfyUI-Attune" if path.startswith("/attune/") else "a ComfyUI, without a login"
            raise ServerError(f"{self.url}{path} answered {error.code}: wanted {wanted}; look at the address") from None
        except ValueError:
            raise ServerError(
                f"{self.url} is no ComfyUI: wanted JSON at {path}, found something else; look at the address"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error) or type(error).__name__
            raise ServerError(
                f"no ComfyUI answers at {self.url} ({why}): start it (python main.py, in its folder), or name its "
                "address with --server"
            ) from None

    def post(self, path: str, data: Any) -> Any:
        """POST JSON; raises OSError or ValueError."""
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(), kind)
        with self._opener.open(request, timeout=_WAIT) as answer:
            return json.loads(answer.read() or b"null")

    def open(self) -> None:
        """Listen to what the server tells this client. Raises ServerError."""
        try:
            import aiohttp  # noqa: F401
        except ImportError:
            raise ServerError(
                "the package aiohttp is not there: run this with the Python that runs ComfyUI, which brings it"
            ) from None
        self._thread = threading.Thread(target=self._listen, name="attune bench", daemon=True)
        self._thread.start()
        _, kind, data = self._next(_WAIT)  # the first message says that the socket is open
        if kind in ("", "closed"):
            raise ServerError(
                f"{self.url} does not tell what it runs ({data or 'its websocket is silent'}): what stands between, as "
                "a proxy, must let websockets through"
            )

    def close(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not None:
            self._thread.join(2)

    def _listen(self) -> None:
        self._loop = asyncio.new_event_loop()
        task = self._loop.create_task(self._follow())
        with contextlib.suppress(RuntimeError):  # stopped by close()
            self._loop.run_until_complete(task)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(task)
        self._loop.close()

    async def _follow(self) -> None:
        import aiohttp

        address = f"{self.url}/ws?clientId={self.client}"
        try:
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
                async for message in socket:
                    at = time.perf_counter()
                    if message.type == aiohttp.WSMsgType.TEXT:  # previews are binary
                        body = message.json()
                        self._messages.put((at, str(body.get("type")), body.get("data") or {}))
            self._messages.put((time.perf_counter(), "closed", "the connection was closed"))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._messages.put((time.perf_counter(), "closed", str(error) or type(error).__name__))

    def _next(self, seconds: float) -> tuple[float, str, Any]:
        try:
            return self._messages.get(timeout=seconds)
        except queue.Empty:
            return 0.0, "", None

    def run(self, prompt: Prompt, told: Callable[[str, str], None]) -> Run:
        """Queue a prompt and follow it to its end. Raises RejectedError, ServerError where the server is gone.

        told(node, what): it is at this node. KeyboardInterrupt goes through, after the prompt was stopped.
        """
        prompt_id = str(uuid.uuid4())  # newer servers take it: a prompt can be stopped before they have answered
        body = {"prompt": prompt, "client_id": self.client, "prompt_id": prompt_id}
        try:
            answer = self.post("/prompt", body)
            prompt_id = str(answer["prompt_id"])
            watch = _Watch(prompt_id, told)
            if answer.get("node_errors"):
                watch.run.refused = why_rejected(answer, prompt)
            silent = 0
            while True:
                at, kind, data = self._next(0.5)
                if kind == "closed":
                    raise ServerError(f"{self.url} is gone ({data}): look into its log")
                if kind and isinstance(data, dict) and watch.take(at, kind, data):
                    break
                silent = 0 if kind else silent + 1
                if silent % _SILENT == _SILENT - 1 and not self._has(prompt_id):
                    watch.run.status, watch.run.reason = "interrupted", "it was taken out of the server's queue"
                    break
            return self._finish(watch.run)
        except KeyboardInterrupt:
            self._stop(prompt_id)
            raise
        except urllib.error.HTTPError as error:
            raise RejectedError(why_rejected(error.read(), prompt)) from None
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"{self.url} did not take the prompt ({error})") from None

    def _has(self, prompt_id: str) -> bool:
        """Does it wait or run, or has it ended? One that somebody takes out of the queue has no message."""
        queue = self.get("/queue")
        there = [item[1] for name in ("queue_running", "queue_pending") for item in queue.get(name, [])]
        return prompt_id in there or bool(self.get(f"/history/{prompt_id}"))

    def _finish(self, run: Run) -> Run:
        """Add what the prompt wrote; the server keeps it a moment after it said that it was done."""
        for _ in range(100):
            if entry := self.get(f"/history/{run.prompt_id}").get(run.prompt_id):
                run.outputs = entry.get("outputs") or {}
                break
            time.sleep(0.05)
        return run

    def _stop(self, prompt_id: str) -> None:
        """Stop our prompt and nobody else's."""
        with contextlib.suppress(OSError, ValueError, ServerError):
            running = [item[1] for item in self.get("/queue").get("queue_running", [])]
            if prompt_id in running:
                self.post("/interrupt", {"prompt_id": prompt_id})
            else:
                self.post("/queue", {"delete": [prompt_id]})
