"""What a browser gets that shows the panel while a model is sampled: what is new in the record, a few times a second.

The server's event loop looks at the records of the runs, only while somebody watches. The thread that samples does
nothing for it: it is asked whether somebody watches once, when a run is over. Nothing is read from a device before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from .following import Following
from .runs import RUNS, RunInfo
from .server import server_instance

log = logging.getLogger("attune")
EVENT = "attune.live"
SECONDS = 30.0  # after which a client that has not said again that it watches is forgotten
_EVERY = 0.2  # seconds between two looks
# A cell takes some 2 microseconds to tell. The next look waits for this many seconds for each one that was told: then
# that is less than half a percent of the time, however fast the model and however many blocks it has.
_PAUSE = 5e-4
_LONGEST = 5.0
_MOST_WAITING = 50  # messages of the host's; more wait where a page does not take what it is sent
_MOST_CLIENTS = 16


class TooManyError(Exception):
    """As many clients watch as may."""


@dataclass
class _Client:
    """A page that shows the panel. `had`: numbers of the runs of which it has had everything once."""

    socket: Any
    until: float
    had: set[int] = field(default_factory=set)


class Live:
    """Who watches, and what they are sent. All but `ended` belongs to the server's event loop."""

    def __init__(self) -> None:
        self.watched = False
        self._clients: dict[str, _Client] = {}
        self._following: dict[int, Following] = {}
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, client_id: str, on: bool) -> bool:
        """This client shows the panel, for the next 30 seconds, or does not any more; is it sent anything now?

        Raises KeyError where no page with this id is connected, TooManyError where 16 others watch.
        """
        if not on:
            self._clients.pop(client_id, None)
            self._count()
            return False
        socket = server_instance().sockets[client_id]
        client = self._clients.get(client_id)
        if client is None or client.socket is not socket:  # a page that was loaded anew has nothing yet
            self._forget()
            if client is None and len(self._clients) >= _MOST_CLIENTS:
                raise TooManyError
            client = self._clients[client_id] = _Client(socket, 0.0)
        client.until = time.monotonic() + SECONDS
        self._count()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(0, self._tick)
        return True

    def ended(self, run: RunInfo) -> None:
        """A run is over and its record is closed; told by the thread that sampled."""
        if self.watched:
            try:
                server_instance().loop.call_soon_threadsafe(self._finish, run)
            except RuntimeError:  # ComfyUI ends
                log.debug("The end of a run could not be told", exc_info=True)

    def _count(self) -> None:
        self.watched = bool(self._clients)

    def _forget(self) -> None:
        """Clients that are gone, or have not been heard of for long."""
        sockets, now = server_instance().sockets, time.monotonic()
        for client_id, client in list(self._clients.items()):
            if client.until < now or sockets.get(client_id) is not client.socket:
                del self._clients[client_id]
        self._count()

    def _tick(self) -> None:
        self._timer = None
        self._forget()
        if not self._clients:
            self._following.clear()
            return
        cells = 0
        try:
            if not self._jammed():
                cells = self._tell()
        except Exception:  # it is only shown; who watches asks again
            log.exception("Attune: what runs could not be told to the browser")
            self._clients.clear()
            self._count()
            return
        pause = min(max(_EVERY, cells * _PAUSE), _LONGEST)
        self._timer = asyncio.get_running_loop().call_later(pause, self._tick)

    def _jammed(self) -> bool:
        messages = getattr(server_instance(), "messages", None)
        return messages is not None and messages.qsize() > _MOST_WAITING

    def _tell(self) -> int:
        """Send what is new of one run, as a client gets one event at a time; returns the number of cells in it."""
        running = {run.number: run for run in RUNS.all() if run.status == "running"}
        for number in self._following.keys() - running:
            del self._following[number]
        for number, run in running.items():
            if number not in self._following:
                self._following[number] = Following(run)
        for number, one in list(self._following.items()):
            new = [client_id for client_id, client in self._clients.items() if number not in client.had]
            old = [client_id for client_id in self._clients if client_id not in new] if one.look() else []
            if old or new:
                self._following[number] = self._following.pop(number)  # the others come first the next time
                return self._send(one, old, new)
        return 0

    def _send(self, one: Following, old: list[str], new: list[str]) -> int:
        """Send what has changed to `old` and everything to `new`; returns the number of cells in it."""
        cells = 0
        for full, ids in ((False, old), (True, new)):
            if ids:
                event = one.event(full)
                cells += len(event["cells"]) * len(ids)
                for client_id in ids:
                    self._clients[client_id].had.add(one.run.number)
                    server_instance().send_sync(EVENT, event, client_id)
        if len(new) == len(self._clients):
            one.changed.clear()  # all of it was in what they got
        one.told()
        return cells

    def _finish(self, run: RunInfo) -> None:
        self._following.pop(run.number, None)
        self._forget()
        if not self._clients:
            return
        try:
            one = Following(run)
            one.end()
            self._send(one, [], list(self._clients))
            for client in self._clients.values():
                client.had.discard(run.number)
        except Exception:
            log.exception("Attune: the end of a run could not be told to the browser")


LIVE = Live()
