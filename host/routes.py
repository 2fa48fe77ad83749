"""The pack's routes: what the panel reads, and its two triggers. docs/panel.md tells what each gives."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

from ..kernels import KERNELS
from ..measure.run_picture import picture
from ..measure.run_text import KIND, SCHEMA, runs_text
from .again import AlreadyTryingError
from .comfyui import default_account, switched_off
from .doctor import bundle, kernel_table, machine_account
from .following import Following
from .live import LIVE, SECONDS, TooManyError
from .process import machine, verdicts
from .prompts import last_prompt
from .requests import RefusedError, only, said, serve
from .runs import RUNS, RunInfo
from .server import prompt_runs, server_instance

log = logging.getLogger("attune")
PROBE_EVENT = "attune.probe"
_MOST_BYTES = 2_000_000  # of an answer
_MOST_CELLS = 40_000  # of a run, about 20 bytes each
_LONGEST_ID = 128
# What an answer that is too long goes without, in this order.
_SPARE = ("plans", "cells", "events", "steps", "nodes", "notes")
_drawing = threading.Lock()


def _as_json(data: Any) -> str:
    """As browsers read it: they know no NaN and no infinity."""
    try:
        return json.dumps(data, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(json.loads(json.dumps(data), parse_constant=lambda _: None), separators=(",", ":"))


def _bounded(data: dict[str, Any]) -> str:
    """`data` as JSON of at most 2 MB; "left_out" names what had to be emptied for that."""
    left: list[str] = []
    for key in ("", *_SPARE):
        if key and data.get(key):
            data[key] = type(data[key])()
            left.append(key)
        text = _as_json({**data, "left_out": left})
        if len(text) <= _MOST_BYTES:  # plain letters: json.dumps escapes the others
            break
    return text


def _last_runs() -> str:
    """The last runs, short, oldest first; the oldest stay away where they are too much."""
    parts: list[str] = []
    room = _MOST_BYTES
    for run in reversed(RUNS.all()):
        parts.insert(0, _as_json(run.as_dict()))
        room -= len(parts[0]) + 1
        if room < 0:
            del parts[0]
            break
    return f'{{"runs": [{",".join(parts)}]}}'


def _ended_run(request: web.Request) -> RunInfo:
    number = request.match_info["number"]
    run = RUNS.numbered(int(number)) if number.isascii() and number.isdigit() and len(number) < 10 else None
    if run is None:
        raise RefusedError(404, f"there is no run {said(number)}, or it is not among the last any more")
    if not run.ended:
        raise RefusedError(409, f"run {number} still goes on; it can be asked for when it is over")
    return run


def _one_run(run: RunInfo) -> str:
    """All that is known of a run that has ended, with its patterns spread out as cells."""
    data = run.as_data(machine())
    del data["patterns"]
    for step in data["steps"]:
        del step["patterns"], step["discarded"]
    one = Following(run)
    one.end()
    cells, _, left = one.cells(most=_MOST_CELLS)
    return _bounded({**data, "run": run.number, "kernel_names": one.kernels, "cells": cells, "steps_left_out": left})


def _as_file(run: RunInfo, form: str) -> bytes:
    """What `attune report` gives of a run: text, the file that it reads, or the picture."""
    data = run.as_data(machine())
    if form == "json":
        return json.dumps({"kind": KIND, "schema": SCHEMA, **data}, indent=2).encode()
    if form == "text":
        return (runs_text([data]) + "\n").encode()
    from PIL import Image

    file = io.BytesIO()
    with _drawing:
        Image.fromarray(picture([data])).save(file, "PNG")
    return file.getvalue()


_FORMS = {"text": ("txt", "text/plain"), "json": ("json", "application/json"), "png": ("png", "image/png")}


async def _json(make: Callable[[], str]) -> web.Response:
    """What `make` gives, made in a thread: it may wait for the disk."""
    return web.json_response(text=await asyncio.to_thread(make))


async def _machine(_request: web.Request) -> web.Response:
    return await _json(lambda: _as_json(machine_account()))


async def _kernels(_request: web.Request) -> web.Response:
    return await _json(lambda: _as_json({"kernels": kernel_table()}))


async def _default(_request: web.Request) -> web.Response:
    return web.json_response(default_account())


async def _prompt(_request: web.Request) -> web.Response:
    return web.json_response({"prompt": last_prompt()})


async def _runs(_request: web.Request) -> web.Response:
    return await _json(_last_runs)


async def _run(request: web.Request) -> web.Response:
    run = _ended_run(request)
    return await _json(lambda: _one_run(run))


async def _report(request: web.Request) -> web.Response:
    form = request.query.get("format", "text")
    if form not in _FORMS:
        raise RefusedError(400, f"unknown format {said(form)}: wanted {', '.join(_FORMS)}")
    run = _ended_run(request)
    ending, kind = _FORMS[form]
    headers = {"Content-Disposition": f'attachment; filename="attune-run-{run.number}.{ending}"'}
    charset = "utf-8" if form == "text" else None
    body = await asyncio.to_thread(_as_file, run, form)
    return web.Response(body=body, content_type=kind, charset=charset, headers=headers)


async def _bundle(_request: web.Request) -> web.Response:
    return web.Response(text=await asyncio.to_thread(bundle), content_type="text/plain")


async def _watch(data: dict[str, Any]) -> web.Response:
    only(data, "client_id", "on")
    client_id, on = data.get("client_id"), data.get("on")
    if not isinstance(client_id, str) or not 0 < len(client_id) <= _LONGEST_ID:
        raise RefusedError(400, f"client_id: wanted a text of 1 to {_LONGEST_ID} letters, found {said(client_id)}")
    if not isinstance(on, bool):
        raise RefusedError(400, f"on: wanted true or false, found {said(on)}")
    try:
        live = not switched_off() and LIVE.watch(client_id, on)
    except KeyError:
        raise RefusedError(404, "no page with this client_id is connected") from None
    except TooManyError:
        raise RefusedError(429, "too many pages show the panel; close one of them") from None
    return web.json_response({"live": live, "seconds": SECONDS})


def _say_tried(kernel: str, outcome: str, done: int, total: int) -> None:
    event = {"done": done, "total": total, "kernel": kernel, "outcome": outcome, "ended": done == total}
    try:
        server_instance().send_sync(PROBE_EVENT, event)
    except RuntimeError:  # ComfyUI ends
        log.debug("The progress of the probe could not be told", exc_info=True)


async def _try_again(data: dict[str, Any]) -> web.Response:
    only(data, "kernels")
    known = [kernel.name for kernel in KERNELS]
    names = data.get("kernels", known)
    if not isinstance(names, list) or not names:
        raise RefusedError(400, f"kernels: wanted a list of names, found {said(names)}")
    if strange := [name for name in names if name not in known]:
        raise RefusedError(400, f"kernels: {said(strange[0])} is none of those that can be tried: {', '.join(known)}")
    if switched_off():
        raise RefusedError(409, "ATTUNE=off: the pack does nothing in this ComfyUI")
    if prompt_runs():
        raise RefusedError(409, "a prompt runs; kernels are tried when it is over")
    names = list(dict.fromkeys(names))
    try:
        await asyncio.to_thread(verdicts().try_again, names, _say_tried)
    except AlreadyTryingError:
        raise RefusedError(409, "kernels are being tried already") from None
    return web.json_response({"started": True, "total": len(names)}, status=202)


async def _progress(_request: web.Request) -> web.Response:
    return web.json_response(verdicts().progress())


def add_routes() -> None:
    """Register them with ComfyUI's server, where there is one."""
    server = server_instance()
    if server is None or not hasattr(server, "routes"):
        return
    serve(server.routes, "/attune/machine", get=_machine)
    serve(server.routes, "/attune/kernels", get=_kernels)
    serve(server.routes, "/attune/default", get=_default)
    serve(server.routes, "/attune/last-prompt", get=_prompt)
    serve(server.routes, "/attune/runs", get=_runs)
    serve(server.routes, "/attune/runs/{number}", get=_run)
    serve(server.routes, "/attune/runs/{number}/report", get=_report)
    serve(server.routes, "/attune/bundle", get=_bundle)
    serve(server.routes, "/attune/probe", get=_progress, post=_try_again)
    serve(server.routes, "/attune/watch", post=_watch)
