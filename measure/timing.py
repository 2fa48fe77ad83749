"""How long a function takes on a device: repeated, each time on inputs that are new and in no cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Larger than any GPU's second-level cache and most CPUs' last one; overwritten before each call that is timed.
_CACHE = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of single calls. `low` and `high` are the quartiles, so half of all calls lie between them."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return _quartiles(self.seconds)[0]

    @property
    def high(self) -> float:
        return _quartiles(self.seconds)[1]

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.high - self.low) / self.median if self.median > 0 else 0.0


def _quartiles(seconds: tuple[float, ...]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True, slots=True)
class Effort:
    """How often a call is repeated: `warm` times untimed, then until `budget` seconds are used, `least` to `most`.

    A call that takes longer than all of that is given up on sooner: see `measure`.
    """

    warm: int = 2
    least: int = 5
    most: int = 50
    budget: float = 1.0


def waiter(device: torch.device) -> Callable[[], Any]:
    """What waits for everything that was handed to the device."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "xpu":
        return lambda: torch.xpu.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


class _Events:
    """One call between two events that the GPU passes in its own time: what the host does meanwhile is not in it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self._begin.record(self._stream)

    def stop(self) -> float:
        self._end.record(self._stream)
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1000


class _HostClock:
    """One call by the host's clock, the device idle before it and waited for after it."""

    def __init__(self, device: torch.device) -> None:
        self._wait, self._begin = waiter(device), 0.0

    def start(self) -> None:
        self._wait()
        self._begin = time.perf_counter()

    def stop(self) -> float:
        self._wait()
        return time.perf_counter() - self._begin


def measure(
    call: Callable[[], Any],
    device: torch.device,
    effort: Effort,
    fresh: Callable[[], Any] = lambda: None,
    busy: Callable[[], Any] | None = None,
) -> Times:
    """Time `call`, after `fresh` each time, which is not timed. Raises what they raise.

    Warming up ends when the budget is used, and so does the rest, after fewer than `least` calls, when four times the
    budget is: a call that takes minutes is timed once. busy: called once, while the device still works on a further
    call: to read its clock and its power.
    """
    clock = _Events(device) if device.type == "cuda" else _HostClock(device)
    wait = waiter(device)
    scratch = torch.empty(_CACHE.get(device.type, _CACHE["cuda"]), dtype=torch.uint8, device=device)
    began = time.perf_counter()
    for _ in range(effort.warm):
        fresh()
        call()
        wait()
        if time.perf_counter() - began > effort.budget:
            break
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < effort.most:
        used = time.perf_counter() - began
        if seconds and used > effort.budget * (1 if len(seconds) >= effort.least else 4):
            break
        fresh()
        scratch.zero_()
        clock.start()
        call()
        seconds.append(clock.stop())
    if busy is not None:
        call()
        busy()
        wait()
    return Times(tuple(seconds))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest call of a square matrix product in `dtype`, two sizes tried on a GPU.

    It is what attention is compared with: the figure of a data sheet is reached by nothing that runs here. A GPU that
    is limited by power may do better on attention than on this, and 8-bit kernels count against it as well. On a CPU
    float32 counts too: kernels compute in it, and products of narrower numbers may be far slower.
    """
    if device.type == "cpu" and dtype is not torch.float32:
        return max(matmul_peak(device, torch.float32), _matmul_peak(device, dtype))
    return _matmul_peak(device, dtype)


def _matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    on_cpu = device.type == "cpu"
    sizes = (1024,) if on_cpu else (4096, 8192)
    best = 0.0
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype, device=device)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        times = measure(multiply, device, Effort(warm=3, least=5, most=30, budget=0.5))
        best = max(best, 2 * size**3 / min(times.seconds) / 1e12)
    return best
