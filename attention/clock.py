"""How long single attention calls take, without waiting for the device while the run goes on."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

_MOST = 20_000  # calls that are timed in a run: a pair of events each, some 10 MB in all

TIMED_DEVICES = frozenset({"cpu", "cuda"})
Mark = tuple[torch.device, Any]


@dataclass
class Timing:
    """What the timed calls of one kernel took: their number, and seconds in all."""

    calls: int = 0
    seconds: float = 0.0


class Clock:
    """Times calls from `start` to `stop`; `read` adds them up, once, when the run is over.

    On CUDA by pairs of events on the current stream, which the device passes in its own time; on the CPU by
    `time.perf_counter`. Other devices are not timed. `untimed` counts the calls that were not: those, those after the
    first `most`, and those whose events failed. May be used by several threads.
    """

    def __init__(self, most: int = _MOST) -> None:
        self.untimed = 0
        self._most = most
        self._pairs: list[tuple[str, Any, Any]] = []
        self._timings: dict[str, Timing] = {}
        self._lock = threading.Lock()

    def start(self, device: torch.device) -> Mark | None:
        """A call begins on `device`. None: it is not timed."""
        if len(self._pairs) < self._most:
            try:
                if device.type in TIMED_DEVICES:
                    return device, now(device)
            except RuntimeError:  # the device is in a state that takes no events: a graph is being captured, or worse
                pass
        return None

    def stop(self, mark: Mark | None, kernel: str) -> None:
        """The call that began at `mark` was handed to the device in full, by `kernel`."""
        if mark is not None:
            device, begin = mark
            try:
                end = now(device)
            except RuntimeError:
                pass
            else:
                self._pairs.append((kernel, begin, end))
                return
        with self._lock:
            self.untimed += 1

    def known(self, since: int = 0) -> tuple[int, dict[str, float]]:
        """(number of calls so far, seconds per kernel name of those from number `since` on that are known already).

        Known are those on the CPU: a device would have to be asked. Nothing is left after `read`.
        """
        pairs, seconds = self._pairs[since:], defaultdict[str, float](float)
        for kernel, begin, end in pairs:
            if isinstance(begin, float):
                seconds[kernel] += end - begin
        return since + len(pairs), dict(seconds)

    def read(self) -> dict[str, Timing]:
        """Seconds per kernel name. Waits for the device; never raises, and may be asked again."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
            for kernel, begin, end in pairs:
                try:
                    seconds = seconds_between(begin, end)
                except Exception:  # a device that is lost tells nothing more
                    self.untimed += 1
                    continue
                timing = self._timings.setdefault(kernel, Timing())
                timing.calls += 1
                timing.seconds += seconds
            return self._timings


def now(device: torch.device) -> Any:
    """A moment in the work of the device, one of TIMED_DEVICES: for `seconds_between`."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds between two moments of one device. Waits until it has passed the second."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
