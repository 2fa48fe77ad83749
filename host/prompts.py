"""The prompt that ComfyUI runs, or ran last: does the newest run in the panel belong to it, and if not, why not?"""

from __future__ import annotations

import sys
from typing import Any

from .comfyui import default_account
from .runs import RUNS
from .server import server_instance

_PACK = __name__.partition(".host.")[0]
_BENCHMARK = "attune_benchmark"  # the node of the panel's own prompts (web/panel/benchmark.js)
_LOOKED_AT = 20  # prompts back to one that is none of them


def _patches(class_type: Any) -> bool:
    """Is this one of the pack's nodes that give a model on? The others choose no kernel, and no run is told of them."""
    kind = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get(class_type)
    return getattr(kind, "__module__", "").startswith(f"{_PACK}.") and "MODEL" in (getattr(kind, "RETURN_TYPES", ()))


def _is_benchmark(item: Any) -> bool:
    return _BENCHMARK in item[2]


def _messages(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was told while a prompt ran, by the name of the message."""
    return {name: data for name, data in (entry.get("status") or {}).get("messages", ())}


def _state(entry: dict[str, Any]) -> str:
    if "execution_interrupted" in _messages(entry):
        return "stopped"
    return "finished" if (entry.get("status") or {}).get("status_str") == "success" else "failed"


def last_prompt() -> dict[str, Any] | None:
    """The prompt that runs, or else the one that ran last, whoever queued it; None where nobody can tell.

    `state`: "running", "finished", "failed" or "stopped". `nodes`: how many of its nodes put a kernel on a model; the
    front end leaves out what is bypassed or muted. `runs`: the numbers of its sampling runs. `cached`: all of it came
    from the host's cache. `default`: the kernel that the environment names for models without a node, or "".
    Benchmarks of the panel do not count.
    """
    try:
        return _last_prompt()
    except (AttributeError, IndexError, KeyError, TypeError):  # another pack's queue, or its entries in the history
        return None


def _last_prompt() -> dict[str, Any] | None:
    queue = getattr(server_instance(), "prompt_queue", None)
    if queue is None:
        return None
    with queue.mutex:
        running = list(queue.currently_running.values())
        names = list(queue.history)[-_LOOKED_AT:]
        ended = [queue.history[name] for name in reversed(names)]
    item = next((one for one in running if not _is_benchmark(one)), None)
    state, cached = "running", False
    if item is None:
        entry = next((one for one in ended if not _is_benchmark(one["prompt"])), None)
        if entry is None or not _is_newest(entry):
            return None
        item, state = entry["prompt"], _state(entry)
        cached = set(item[2]) <= set(_messages(entry).get("execution_cached", {}).get("nodes", ()))
    return {
        "prompt_id": item[1],
        "state": state,
        "nodes": sum(_patches(node.get("class_type")) for node in item[2].values()),
        "runs": [run.number for run in RUNS.of_prompt(item[1])],
        "cached": cached,
        "default": default_account()["requested"],
    }


def _is_newest(entry: dict[str, Any]) -> bool:
    """Is there no run of a later prompt? A user may have taken that one out of the history."""
    newest = next(reversed(RUNS.all()), None)
    if newest is None or newest.prompt_id == entry["prompt"][1]:
        return True
    began = _messages(entry).get("execution_start", {}).get("timestamp")
    return isinstance(began, (int, float)) and began / 1000 > newest.started
