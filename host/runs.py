"""The last sampling runs, for the nodes' faces and the command line: kept in memory, sent to the browser when done."""

from __future__ import annotations

import bisect
import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..attention.account import account
from ..attention.machine import Machine
from ..attention.record import Record

_KEPT = 50


def _facts(machine: Machine, used: list[str]) -> dict[str, Any]:
    """What a run ran on. `used`: the devices its forwards were on, as torch calls them; empty where nobody knows."""
    devices = [machine.device(name) for name in used] or [machine.main_device]
    return {
        "devices": [{"name": one.name, "title": one.title, "kind": one.kind} for one in devices],
        "torch": machine.torch,
        "cuda": machine.cuda,
        "driver": machine.driver,
        "system": machine.system,
        "python": machine.python,
        "packages": dict(machine.packages),
        "host_attention": machine.host_attention,
        "host_flag": machine.host_flag,
    }


@dataclass
class RunInfo:
    """One sampling run: where in the host it happened, and its record.

    `workflow_id` is the id of the workflow in the browser tab that queued the prompt, None for API prompts. `steps` is
    that of the whole sampling, 0 if unknown; `first_step` is the first of this run in it. `made_by` is a fingerprint
    of the sampler node and all that leads to it, "" if unknown. `node_types` maps node ids to class names, `advice`
    node ids to sentences about this run. `started` is in seconds since 1970, `seconds` how long the run took. `file`:
    where it is kept on disk. `host`: "diffusers" where it was not ComfyUI. `step_ends`: for each step that has ended,
    how many forwards there were by then and which step comes next, from 0; None where nobody tells. `ended`: its record
    is whole.
    """

    number: int
    prompt_id: str | None
    workflow_id: str | None
    client_id: str | None
    sampler_node: str | None
    model: str
    record: Record
    node_types: dict[str, str]
    steps: int = 0
    first_step: int = 0
    made_by: str = ""
    status: str = "running"
    advice: dict[str, list[str]] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    file: Path | None = None
    host: str = ""
    step_ends: list[tuple[int, int]] | None = None
    ended: bool = False

    def step_of(self, forward: int) -> int:
        """The step that a forward of a run that goes on belongs to, by what its sampler says after each step.

        The noise levels tell it better, but they may be on a device: they are read when the run is over.
        """
        steps = len(self.record.sigmas) - 1
        if self.step_ends is None or steps < 1:
            return self.first_step + forward
        before = bisect.bisect_right(self.step_ends, forward, key=lambda end: end[0])
        step = self.step_ends[before - 1][1] if before else 0
        return self.first_step + min(step, steps - 1)

    def close(self) -> None:
        """The run has ended, in whatever way; `status` says how."""
        self.seconds = time.time() - self.started
        self.record.first_step = self.record.first_step or self.first_step
        self.record.close()
        self.ended = True

    def _nodes(self) -> dict[str, dict[str, Any]]:
        nodes = {}
        for source, node in self.record.nodes().items():
            advice = self.advice.get(source, [])
            data = node.as_dict()
            data["text"] = "\n".join([data["text"], *advice])
            nodes[source] = {"node_type": self.node_types.get(source, ""), **data, "advice": advice}
        return nodes

    def _when(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started))

    def as_dict(self) -> dict[str, Any]:
        """What the browser shows; short. `seconds` is None while the run goes on."""
        return {
            "run": self.number,
            "prompt_id": self.prompt_id,
            "workflow_id": self.workflow_id,
            "sampler_node": self.sampler_node,
            "model": self.model,
            "forwards": self.record.forwards,
            "repeated": self.record.repeated,
            "status": self.status,
            "started": self._when(),
            "seconds": round(self.seconds, 3) if self.ended else None,
            "observed": dict(self.record.observed()),
            "notes": self.record.notes,
            "nodes": self._nodes(),
        }

    def as_data(self, machine: Machine) -> dict[str, Any]:
        """Everything that is known of a run that has ended, for JSON."""
        sigmas = [float(sigma) for sigma in self.record.sigmas]
        return {
            "started": self._when(),
            "seconds": round(self.seconds, 3),
            "status": self.status,
            "prompt_id": self.prompt_id,
            "workflow_id": self.workflow_id,
            "sampler_node": self.sampler_node,
            "model": self.model,
            "machine": _facts(machine, list(self.record.devices)),
            "stage": {
                "first_step": self.record.first_step,
                "steps": max(0, len(sigmas) - 1),
                "steps_in_all": self.steps,
                "first_sigma": sigmas[0] if sigmas else None,
                "last_sigma": sigmas[-1] if sigmas else None,
            },
            **account(self.record),
            "nodes": self._nodes(),
            **({"host": self.host} if self.host else {}),
        }

    def summary(self) -> dict[str, Any]:
        """A few words for the metadata of what is saved."""
        record = self.record
        found: dict[str, Any] = {
            "sampler_node": self.sampler_node,
            "model": self.model,
            "status": self.status,
            "requested": [node.requested for node in record.nodes().values() if node.requested],
            "observed": dict(record.observed()),
        }
        if record.repeated:
            found["repeated_forwards"] = record.repeated
        if demoted := list(
            dict.fromkeys(one.kernel for one in record.happened() if one.kind == "demotion" and one.kernel)
        ):
            found["demoted"] = demoted
        return found


class Runs:
    """The last runs, oldest first; bounded, and safe to read from the server's thread."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._runs: deque[RunInfo] = deque(maxlen=kept)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def open(self, **about: Any) -> RunInfo:
        with self._lock:
            run = RunInfo(number=next(self._numbers), **about)
            self._runs.append(run)
            return run

    def all(self) -> list[RunInfo]:
        with self._lock:
            return list(self._runs)

    def numbered(self, number: int) -> RunInfo | None:
        return next((run for run in self.all() if run.number == number), None)

    def of_prompt(self, prompt_id: str | None) -> list[RunInfo]:
        return [run for run in self.all() if prompt_id is not None and run.prompt_id == prompt_id]

    def as_list(self) -> list[dict[str, Any]]:
        return [run.as_dict() for run in self.all()]


RUNS = Runs()
