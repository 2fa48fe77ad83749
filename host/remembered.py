"""Kernels that failed in a model, remembered for later runs: on disk, under the model's fingerprint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..attention.guard import Finding, Place
from ..attention.kernel import Kernel
from ..attention.machine import Machine
from ..doctor.store import Store

_MODELS, _EACH = 200, 1000  # what is kept: models, and findings of one

State = dict[str, list[dict[str, Any]]]


def store(folder: Path) -> Store:
    """The file in the folder that doctor.store.home() gave: model → what was found, oldest first."""

    def parse(data: Any) -> State:
        state = {str(model): [dict(entry) for entry in entries] for model, entries in (data or {}).items()}
        for entries in state.values():
            for entry in entries:
                _check(entry)
        return state

    return Store(folder / "failures.json", "attune failures", 1, parse, lambda state: state)


def _check(entry: dict[str, Any]) -> None:
    """Raises TypeError or KeyError where it is none: one that somebody has edited must not cost a run."""
    hash(_finding(entry))
    list(entry["around"])


def _finding(entry: dict[str, Any]) -> Finding:
    return Finding(str(entry["kernel"]), Place(**entry["place"]), str(entry["reason"]))


def fingerprint(model: Any) -> str:
    """Tells models apart by what they compute: class, configuration, size and type of the weights, not their values.

    `model` is the host's BaseModel.
    """
    config = getattr(getattr(model, "model_config", None), "unet_config", None) or {}
    net = getattr(model, "diffusion_model", None)
    size = sum(parameter.numel() for parameter in net.parameters()) if hasattr(net, "parameters") else 0
    about = (type(model).__name__, type(net).__name__, sorted((str(k), str(v)) for k, v in config.items()), size)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:24]


def _around(kernel: Kernel | None, machine: Machine) -> list[str]:
    """What a finding holds for: with a new version, or from another source, the kernel gets a new chance."""
    package = "" if kernel is None else machine.packages.get(kernel.package, "")
    fetched = "" if kernel is None else str(machine.fetched.get(kernel.name, ""))
    return [package, fetched, kernel.origin if kernel else "", machine.torch, machine.main_device.title]


def recall(folder: Path, model: str, kernels: dict[str, Kernel], machine: Machine) -> list[Finding]:
    """What was found in earlier runs of the model with this fingerprint, and still holds."""
    entries = store(folder).read().get(model, [])
    return [_finding(entry) for entry in entries if entry["around"] == _around(kernels.get(entry["kernel"]), machine)]


def failed(folder: Path, kernels: dict[str, Kernel], machine: Machine) -> dict[str, tuple[str, int]]:
    """Kernel → (why it is not used somewhere, in how many models), of what still holds."""
    found: dict[str, tuple[str, int]] = {}
    for entries in store(folder).read().values():
        held = {
            entry["kernel"]: entry["reason"]
            for entry in entries
            if entry["around"] == _around(kernels.get(entry["kernel"]), machine)
        }
        for name, reason in held.items():
            found[name] = (str(reason), found.get(name, ("", 0))[1] + 1)
    return found


def remember(
    folder: Path, model: str, findings: Iterable[Finding], kernels: dict[str, Kernel], machine: Machine
) -> None:
    """Keep `findings` for later runs."""

    def add(state: State) -> None:
        entries = state.pop(model, [])
        known = {(entry["kernel"], Place(**entry["place"])) for entry in entries}
        for finding in findings:
            if (finding.kernel, finding.place) not in known:
                around = _around(kernels.get(finding.kernel), machine)
                entries.append({**asdict(finding), "around": around, "when": int(time.time())})
        state[model] = entries[-_EACH:]  # at the end: the models used last are kept
        for old in list(state)[:-_MODELS]:
            del state[old]

    store(folder).update(add)


def forget(folder: Path, names: Iterable[str], kernels: Mapping[str, Kernel], machine: Machine) -> None:
    """Drop what holds here against kernels of these names: each gets a new chance in every model."""
    gone = {name: _around(kernels.get(name), machine) for name in names}

    def drop(state: State) -> None:
        for model, entries in list(state.items()):
            state[model] = [entry for entry in entries if entry["around"] != gone.get(entry["kernel"])]
            if not state[model]:
                del state[model]

    if any(gone.get(entry["kernel"]) == entry["around"] for found in store(folder).read().values() for entry in found):
        store(folder).update(drop)
