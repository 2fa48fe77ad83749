"""What a request to the pack's routes must be like; one that is not is answered with 4xx, and a line in the log."""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientPayloadError, web
from comfy.cli_args import args as launch

log = logging.getLogger("attune")
_MOST_BYTES = 64 * 1024  # of a body
Get = Callable[[web.Request], Awaitable[web.StreamResponse]]
Post = Callable[[dict[str, Any]], Awaitable[web.StreamResponse]]


class RefusedError(Exception):
    """This request is not answered with what it asks for, and why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def serve(routes: web.RouteTableDef, path: str, get: Get | None = None, post: Post | None = None) -> None:
    """Answer requests to `path`. `post` is given the body: a JSON object, sent by a page of this server.

    Every method is taken: the front end's files are served from "/", and would answer those that are left.
    """
    methods = {"GET": get, "HEAD": get, "POST": post}
    allowed = ", ".join(name for name, handler in methods.items() if handler is not None)

    @routes.route("*", path)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            if request.method == "POST" and post is not None:
                return await post(await _body(request))
            if request.method in ("GET", "HEAD") and get is not None:
                return await get(request)
            raise RefusedError(405, f"wanted {allowed}")
        except RefusedError as error:
            method = request.method if request.method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE") else "?"
            log.info("Attune: %s %s was refused (%d): %s", method, path, error.status, error.text)
            headers = {"Allow": allowed} if error.status == 405 else None
            return web.json_response({"error": error.text}, status=error.status, headers=headers)


def only(data: dict[str, Any], *names: str) -> None:
    """Raises RefusedError where a body has other keys."""
    if strange := sorted(data.keys() - set(names)):
        raise RefusedError(400, f"unknown key {said(strange[0])}: wanted {' and '.join(names)}")


def said(value: Any) -> str:
    """A value of somebody else's in a message: short, one line, plain letters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


async def _body(request: web.Request) -> dict[str, Any]:
    if _from_another_site(request):
        raise RefusedError(403, "it comes from another site's page")
    if request.content_type != "application/json":
        raise RefusedError(415, "wanted Content-Type: application/json")
    data = b""
    if (request.content_length or 0) <= _MOST_BYTES:
        try:
            while len(data) <= _MOST_BYTES and (part := await request.content.read(_MOST_BYTES + 1)):
                data += part
        except (ClientPayloadError, ConnectionError, ValueError, web.RequestPayloadError):
            request.content.feed_eof()  # or aiohttp goes on reading, and logs a traceback
            raise RefusedError(400, "the body is broken off or damaged") from None
    if len(data) > _MOST_BYTES or (request.content_length or 0) > _MOST_BYTES:
        raise RefusedError(413, f"the body is over {_MOST_BYTES} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is no JSON") from None
    if not isinstance(found, dict):
        raise RefusedError(400, f"wanted a JSON object, found {type(found).__name__}")
    return found


def _from_another_site(request: web.Request) -> bool:
    """Was this sent by a page of another site? As ComfyUI asks it of every request, and also where it does not.

    It compares Origin and Host where Host is this machine: behind a proxy they may rightly differ. There a page of
    another site has to ask the server first, because of the content type, and is not allowed to.
    """
    origins = request.headers.getall("Origin", [])
    if origins and origins == [getattr(launch, "enable_cors_header", None)]:
        return False  # this very site was allowed by whoever started the server
    if request.headers.get("Sec-Fetch-Site", "").lower() == "cross-site":
        return True
    return any(not _same_place(origin, request.headers.get("Host", "")) for origin in origins)


def _same_place(origin: str, host: str) -> bool:
    try:
        page, here = urlsplit(origin), urlsplit(f"//{host}")
        ports = page.port, here.port
    except ValueError:
        return False
    if not page.hostname or not here.hostname:  # "null": a page in a sandbox, or a file
        return False
    if not _is_this_machine(here.hostname):
        return True
    return page.hostname == here.hostname and (None in ports or ports[0] == ports[1])


def _is_this_machine(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
