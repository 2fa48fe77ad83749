"""The last sampling runs, for the nodes' faces and the command line: kept in memory, sent to the browser when done."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ..attention.record import Record

_KEPT = 50


@dataclass
class RunInfo:
    """One sampling run: where in the host it happened, and its record.

    `workflow_id` is the id of the workflow in the browser tab that queued the prompt, None for API prompts. `steps` is
    that of the whole sampling, 0 if unknown. `node_types` maps node ids to class names, `advice` node ids to sentences
    about this run.
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
    status: str = "running"
    advice: dict[str, list[str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        nodes = {}
        for source, node in self.record.nodes().items():
            advice = self.advice.get(source, [])
            data = node.as_dict()
            data["text"] = "\n".join([data["text"], *advice])
            nodes[source] = {"node_type": self.node_types.get(source, ""), **data, "advice": advice}
        return {
            "run": self.number,
            "prompt_id": self.prompt_id,
            "workflow_id": self.workflow_id,
            "sampler_node": self.sampler_node,
            "model": self.model,
            "forwards": self.record.forwards,
            "status": self.status,
            "observed": dict(self.record.observed()),
            "notes": self.record.notes,
            "nodes": nodes,
        }


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

    def as_list(self) -> list[dict[str, Any]]:
        with self._lock:
            runs = list(self._runs)
        return [run.as_dict() for run in runs]


RUNS = Runs()
