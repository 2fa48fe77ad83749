"""Verdicts that can be found anew, as the panel's button asks, and how far that is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..attention.machine import Device
from ..doctor.kernel_verdict import KernelVerdict
from ..doctor.probe import store, without_trying
from .remembered import forget
from .verdicts import Verdicts

log = logging.getLogger("attune")

# Called for each kernel that was tried: its name, its outcome, and how many of how many that makes; and with "" first.
Told = Callable[[str, str, int, int], None]


class AlreadyTryingError(Exception):
    """Kernels are being tried anew already."""


@dataclass
class _Trying:
    """Kernels that are tried anew on a device: those that are left, of how many, and who is told."""

    device: Device
    left: list[str]
    total: int
    told: Told


class RepeatableVerdicts(Verdicts):
    """Verdicts on kernels, which `try_again` finds anew."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._again: _Trying | None = None
        self._beginning = threading.Lock()

    def try_again(self, names: Sequence[str], told: Told) -> None:
        """Try kernels (no name twice) on the main device anew, in the background and never while a prompt runs.

        What is known of a kernel holds until its new verdict is there. One that works then is given a new chance in
        models where it had failed. told: called from any thread. Raises AlreadyTryingError.
        """
        device = self._read_machine().main_device.name
        self.known(device)  # the kept ones have been read
        with self._beginning:
            if self._again is not None:
                raise AlreadyTryingError
            store(self._folder).update(lambda state: [state.pop(name, None) for name in names])
            told("", "", 0, len(names))
            here = self._like(device)
            self._again = _Trying(here, list(names), len(names), told)
            # What the machine's description alone decides would come last otherwise.
            decided = {name: without_trying(self._kernels[name], self._read_machine(), here) for name in names}
            self._keep(here, {name: verdict for name, verdict in decided.items() if verdict is not None})

    def progress(self) -> dict[str, Any]:
        """{running, waiting, done, total}. `waiting`: for the prompt that runs to end."""
        with self._news:
            again = self._again
            if again is None:
                return {"running": False, "waiting": False, "done": 0, "total": 0}
            done = again.total - len(again.left)
        return {"running": True, "waiting": self._busy(), "done": done, "total": again.total}

    def _next(self) -> tuple[Device | None, list[str]]:
        device, names = super()._next()
        if device is None and self._again is not None:
            return self._again.device, list(self._again.left)
        return device, names

    def _to_be_found(self, device: Device, name: str) -> bool:
        again = self._again
        waits = again is not None and again.device == device and name in again.left
        return waits or super()._to_be_found(device, name)

    def _keep(self, device: Device, found: Mapping[str, KernelVerdict]) -> None:
        super()._keep(device, found)
        again, news = self._again, []
        if again is None or again.device != device:
            return
        self._forgive([name for name, verdict in found.items() if verdict.works and name in again.left])
        with self._news:
            for name, verdict in found.items():
                if name in again.left:
                    again.left.remove(name)
                    news.append((name, verdict.outcome, again.total - len(again.left)))
            if not again.left:
                self._again = None
        for name, outcome, done in news:
            again.told(name, outcome, done, again.total)

    def _forgive(self, names: Sequence[str]) -> None:
        """These were tried anew and work: what later runs hold against them is forgotten."""
        try:
            forget(self._folder, names, self._kernels, self._read_machine())
        except Exception:  # a full disk must not cost the verdicts
            log.exception("Attune: what was remembered against %s could not be forgotten", ", ".join(names))
