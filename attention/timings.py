"""What was measured of kernels on the calls of real runs, and the order that follows from it for `auto`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_low
from typing import NamedTuple

from .call import AttentionCall
from .kernel import Kernel
from .machine import Machine
from .plan import HOST

MOST = 3  # kernels that are measured for a workload, besides the host's own attention
# Timings of a kernel: two, as the machine may do other things during one, and a third where it is near the best.
_NEAR, _TIMES = 1.5, (2, 3)
_GAIN = 0.98  # of the host's time, or less, is worth a change: above that, noise decides
# Below this many operations a call is left to the host: there is nothing to gain. Some 10 µs of a large GPU, 50 of a
# small one, 2 ms of a CPU's core.
_TINY = {"cuda": 2e9, "cpu": 1e8}
# The kernels that are the host's own attention, by the names of `Machine.host_attention`: nothing to compare.
_HOSTS_OWN = {"pytorch": "sdpa", "sub_quad": "sub_quad", "basic": "basic", "xformers": "xformers", "flash": "flash2"}


class Workload(NamedTuple):
    """The calls that a measured time holds for: equal but for their block, and for what changes no time."""

    device: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    dtype: str
    mask: str

    @classmethod
    def of(cls, call: AttentionCall) -> Workload:
        mask = f"{call.mask.kind} {'x'.join(map(str, call.mask.shape))}" if call.mask else ""
        return cls(
            call.device,
            call.batch,
            call.heads,
            call.kv_heads,
            call.q_len,
            call.kv_len,
            call.head_dim,
            call.v_dim,
            str(call.dtype).removeprefix("torch."),
            mask,
        )

    @property
    def operations(self) -> float:
        """Multiplications and additions of the two matrix products: 4·B·H·N·M·D where v is as wide as k."""
        return 2.0 * self.batch * self.heads * self.q_len * self.kv_len * (self.head_dim + self.v_dim)

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def tiny(self) -> bool:
        """Too short for a choice to matter?"""
        return self.operations < _TINY.get(self.device_type, 0.0)

    @property
    def key(self) -> str:
        """The same in words: what it is kept under."""
        kv_heads = f"/{self.kv_heads}" if self.kv_heads != self.heads else ""
        dims = f"{self.head_dim}" if self.v_dim == self.head_dim else f"{self.head_dim}/{self.v_dim}"
        mask = f", {self.mask} mask" if self.mask else ""
        sizes = f"{self.batch} x {self.heads}{kv_heads} x {self.q_len} x {self.kv_len} x {dims}"
        return f"{self.device}: {sizes} {self.dtype}{mask}"

    def __str__(self) -> str:
        kind = "self" if self.q_len == self.kv_len else "cross"
        return f"{kind} attention of {self.q_len:,} × {self.kv_len:,} tokens, {self.heads} heads of {self.head_dim}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a kernel for one workload.

    `pairs`: seconds of one call of it, and of the same call by the host's own attention. `l1`, `l2`: its relative
    errors against float32, of a sample. `reason`: why it is out of the question whatever its time, "" where it is not.
    """

    pairs: tuple[tuple[float, float], ...] = ()
    l1: float = 0.0
    l2: float = 0.0
    reason: str = ""

    @property
    def ratio(self) -> float:
        """Its share of the host's time; infinite where it is out of the question.

        The median, and of two the smaller: a kernel that was disturbed gets its third timing.
        """
        return median_low(own / host for own, host in self.pairs) if self.pairs and not self.reason else float("inf")

    @property
    def host_seconds(self) -> float:
        return median(host for _, host in self.pairs) if self.pairs else 0.0

    def with_pair(self, seconds: float, host_seconds: float) -> Measured:
        return replace(self, pairs=(*self.pairs, (seconds, host_seconds)))


Found = Mapping[str, Measured]


def contenders(runnable: Iterable[str], machine: Machine, device_type: str) -> list[str]:
    """Those of the kernels that can run a call which are worth a measurement, best guess first."""
    names = [name for name in runnable if name not in (HOST, _HOSTS_OWN.get(machine.host_attention))]
    if device_type == "cpu" and "sdpa_flash" in names:
        names = [name for name in names if name != "sdpa"]  # which is that one there
    return names


def to_measure(names: Sequence[str], wished: Iterable[str], found: Found) -> list[str]:
    """Which of the contenders `names` need another timing, those with the fewest first; empty: the choice can be made.

    wished: all kernels of the wish, also those that cannot run just now and were measured before.
    """
    best_guesses = [name for name in wished if name in names or name in found][:MOST]
    new = [name for name in best_guesses if name in names and name not in found]
    begun = [name for name in names if name in found and not found[name].reason]
    best = min([1.0, *(found[name].ratio for name in begun)])

    def enough(measured: Measured) -> int:
        return _TIMES[measured.ratio <= best * _NEAR]

    begun = [name for name in begun if len(found[name].pairs) < enough(found[name])]
    return new + sorted(begun, key=lambda name: len(found[name].pairs))


def ranked(wished: Sequence[str], found: Found, budget: float, kernels: Mapping[str, Kernel]) -> tuple[str, ...]:
    """`wished`, fastest first by what was found. What gains nothing over the host, or was not measured, comes after it.

    budget: how far lossy kernels may be off (relative L1).
    """

    def good(name: str) -> bool:
        measured = found.get(name)
        within = measured is not None and (name not in kernels or kernels[name].exact or measured.l1 <= budget)
        return measured is not None and within and measured.ratio <= _GAIN

    faster = sorted((name for name in wished if good(name)), key=lambda name: found[name].ratio)
    rest = [name for name in wished if name not in faster and name != HOST]
    return (*faster, *([HOST] if HOST in wished else []), *rest)


class Timings:
    """Everything that was measured on this machine, by workload; for all runs of a process, from any thread.

    `known` may be filled from disk. `changed`: something was added since somebody set it to False. `to_compile` holds
    the signatures (prepare.py) that runs have met, `compiled` those that need no compiler any more in this process.
    `allowance`: seconds that earlier runs may still have spent on measuring, and did not; below 0 where they overdrew.
    """

    def __init__(self) -> None:
        self.known: dict[str, dict[str, Measured]] = {}
        self.to_compile: dict[tuple[str, ...], None] = {}
        self.compiled: set[tuple[str, ...]] = set()
        self.allowance = 0.0
        self.host_seconds: dict[str, float] = {}  # of one call, by workload: a run of two forwards cannot find it anew
        self.forgotten: set[str] = set()
        self.slow: set[str] = set()  # workloads whose chosen kernel was slow in the last run
        self.changed = False
        self._lock = threading.Lock()

    def of(self, workload: Workload) -> dict[str, Measured]:
        """A copy of what is known of this workload, by kernel."""
        with self._lock:
            return dict(self.known.get(workload.key, {}))

    def keep(self, workload: Workload, kernel: str, measured: Measured) -> None:
        """This is what is known of a kernel now."""
        with self._lock:
            entry = self.known.pop(workload.key, {})  # to the end: what was used last is kept on disk
            entry[kernel] = measured
            self.known[workload.key] = entry
            self.changed = True

    def forget(self, workload: Workload) -> None:
        """What was measured does not hold any more: the next run begins anew."""
        with self._lock:
            self.changed = self.known.pop(workload.key, None) is not None or self.changed
            self.forgotten.add(workload.key)
            self.slow.discard(workload.key)

    def must_compile(self, signature: tuple[str, ...]) -> bool:
        """Would a call with this signature start a compiler? It is noted down either way, for the next run."""
        with self._lock:
            self.changed = self.changed or signature not in self.to_compile
            self.to_compile[signature] = None
            return signature not in self.compiled
