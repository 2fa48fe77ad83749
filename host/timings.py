"""What `auto` has measured, on disk: for the machine as it is, and forgotten when anything in it changes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..attention.kernel import Kernel
from ..attention.machine import Machine
from ..attention.timings import Measured, Timings
from ..doctor.store import Store

_MACHINES, _WORKLOADS, _SIGNATURES = 20, 500, 100  # what is kept: of machines, and of one machine

State = dict[str, dict[str, Any]]


def tuning_wanted() -> bool:
    """`ATTUNE_TUNE=off` in the environment: `auto` keeps the first choice of its table, and nothing is measured."""
    return os.environ.get("ATTUNE_TUNE", "").strip().lower() not in ("off", "0", "false", "no")


def store(folder: Path) -> Store:
    """The file in the folder that doctor.store.home() gave: machine → what was measured on it, oldest first."""

    def parse(data: Any) -> State:
        state = {str(key): dict(entry) for key, entry in (data or {}).items()}
        for entry in state.values():
            _read(entry)  # raises where somebody has edited it
        return state

    return Store(folder / "timings.json", "attune timings", 1, parse, lambda state: state)


def _read(entry: dict[str, Any]) -> tuple[dict[str, dict[str, Measured]], list[tuple[str, ...]]]:
    known = {
        str(workload): {str(name): _measured(one) for name, one in kernels.items()}
        for workload, kernels in entry["workloads"].items()
    }
    signatures = [tuple(map(str, one)) for one in entry["to_compile"]]
    if any(len(one) < 2 or len(one) != len(signatures[0]) for one in signatures):
        raise ValueError("signatures that are too short, or of different lengths")
    if not math.isfinite(entry["allowance"]):
        raise ValueError(f"wanted seconds, found {entry['allowance']}")
    return known, signatures


def _measured(entry: dict[str, Any]) -> Measured:
    pairs = tuple((float(own), float(host)) for own, host in entry["pairs"])
    numbers = [number for pair in pairs for number in pair]
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError(f"wanted seconds above 0, found {numbers}")
    return Measured(pairs, float(entry["l1"]), float(entry["l2"]), str(entry["reason"]))


def fingerprint(machine: Machine, kernels: Iterable[Kernel]) -> str:
    """What a measurement holds for: devices, driver, versions, the host's own attention, and kernels from elsewhere."""
    devices = [[one.name, one.title, one.sm or one.gfx, one.memory] for one in machine.devices]
    about = [
        devices,
        torch.get_num_threads(),
        machine.system,
        machine.driver,
        machine.torch,
        machine.cuda,
        machine.triton,
        sorted(machine.packages.items()),
        sorted((name, one.folder) for name, one in machine.fetched.items()),
        sorted(kernel.origin for kernel in kernels if kernel.origin),
        machine.host_attention,
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


def load(timings: Timings, folder: Path, machine: str) -> None:
    """Fill `timings` with what is kept for this machine (its fingerprint)."""
    entry = store(folder).read().get(machine)
    if entry is not None:
        known, signatures = _read(entry)
        timings.known.update(known)
        timings.to_compile.update(dict.fromkeys(signatures))
        timings.allowance = entry["allowance"]


def save(timings: Timings, folder: Path, machine: str) -> None:
    """Keep what was measured, where anything has changed."""
    if not timings.changed:
        return
    timings.changed = False

    def add(state: State) -> None:
        known = {
            workload: {name: asdict(one) for name, one in found.items()}
            for workload, found in list(timings.known.items())
        }
        before = state.pop(machine, {"workloads": {}})["workloads"]
        # What other processes have found meanwhile stays.
        others = {key: one for key, one in before.items() if key not in known and key not in timings.forgotten}
        state[machine] = {  # to the end: the machine that was used last
            "when": int(time.time()),
            "workloads": dict(list({**others, **known}.items())[-_WORKLOADS:]),
            "allowance": timings.allowance,
            "to_compile": [list(one) for one in list(timings.to_compile)[-_SIGNATURES:]],
        }
        for old in list(state)[:-_MACHINES]:
            del state[old]

    store(folder).update(add)


class Kept:
    """What `auto` has measured in this process, and what of earlier ones is on disk: read when it is first asked for.

    `timings` is None where nothing is to be measured. about: the machine and the kernels that it holds for.
    """

    def __init__(self, folder: Callable[[], Path], about: Callable[[], tuple[Machine, Iterable[Kernel]]]) -> None:
        self.timings = Timings() if tuning_wanted() else None
        self._folder, self._about, self._fingerprint = folder, about, ""

    def recall(self) -> Timings | None:
        """What was measured here, also in earlier processes; None where nothing is to be measured."""
        if self.timings is not None and not self._fingerprint:
            self._fingerprint = fingerprint(*self._about())
            load(self.timings, self._folder(), self._fingerprint)
        return self.timings

    def keep(self) -> None:
        """Write down what was measured since the last time."""
        if self.timings is not None and self.timings.changed:
            self.recall()
            save(self.timings, self._folder(), self._fingerprint)
