"""What the node AttentionReport says: the runs behind a value, as text and as a picture."""

from __future__ import annotations

from typing import Any

import numpy

from ..measure.run_picture import picture
from ..measure.run_text import runs_text
from .comfyui import attached, switched_off
from .process import machine
from .runs import RUNS, RunInfo
from .server import ancestors, made_by, running_prompt

_OFF = "ATTUNE=off: the pack does nothing in this ComfyUI, so there is no run to report."
_NO_ROUTER = "The model that is connected has no attention node of this pack: its runs are not recorded."
_NONE = (
    "There is no run to report: no model with an attention node of this pack was sampled for this value. Put an "
    "Attention Selector on the model, and this node behind the sampler."
)
_OTHER_MODEL = (
    "The model that is connected was not sampled for this value; what was sampled with another one is left out."
)
_CACHED = (
    "Nothing was sampled for this value in this prompt: ComfyUI took the sampler's result from its cache. It came from "
    "this run."
)


def _sampler(run: RunInfo) -> str:
    """The id, in the prompt, of the node that sampled; nodes that another made while it ran are called after it."""
    return (run.sampler_node or "").split(".")[0]


def _behind(prompt: dict[str, Any], node: str, prompt_id: str | None) -> tuple[list[RunInfo], list[RunInfo]]:
    """The runs that led to the value of `node`: (of this prompt, of earlier ones whose results were cached)."""
    here = RUNS.of_prompt(prompt_id)
    if node not in prompt:  # the host does not tell what leads to this node
        return here, []
    before = ancestors(prompt, node, "value")
    here = [run for run in here if _sampler(run) in before]
    prints = {one: made_by(prompt, one) for one in before - {_sampler(run) for run in here}}
    cached: dict[str, list[RunInfo]] = {}
    for run in RUNS.all():  # the latest prompt in which that sampler was made in the same way
        if run.prompt_id != prompt_id and run.made_by and prints.get(run.sampler_node or "") == run.made_by:
            earlier = cached.setdefault(run.sampler_node or "", [])
            if earlier and earlier[0].prompt_id != run.prompt_id:
                earlier.clear()
            earlier.append(run)
    return here, sorted((run for runs in cached.values() for run in runs), key=lambda run: run.number)


def _select(model: Any, node: str) -> tuple[list[RunInfo], list[RunInfo], list[str]]:
    """(runs of this prompt, runs of earlier ones, what is to be said first)."""
    if switched_off():
        return [], [], [_OFF]
    prompt_id, prompt = running_prompt()
    here, cached = _behind(prompt, node, prompt_id)
    if model is not None:
        standing = attached(model) if hasattr(model, "get_wrappers") else None
        if standing is None:
            return [], [], [_NO_ROUTER]
        others = bool(here or cached)
        here, cached = ([run for run in runs if run.record.policy is standing.router.policy] for runs in (here, cached))
        if others and not here and not cached:
            return [], [], [_OTHER_MODEL]
    if cached and not here:
        return here, cached, [_CACHED]
    return here, cached, [] if here else [_NONE]


def report(model: Any, node: str) -> tuple[str, Any, str]:
    """For node `node`: (text, picture (H, W, 3) uint8, paths of the JSON files, one per line and run)."""
    here, cached, remarks = _select(model, node)
    runs = []
    for run in (*cached, *here):
        runs.append({**run.as_data(machine()), "earlier": run in cached})
    files = "\n".join(str(run.file) for run in (*cached, *here) if run.file)
    pixels: numpy.ndarray = picture(runs, remarks)
    return runs_text(runs, remarks), pixels, files
