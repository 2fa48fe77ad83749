"""`apply`: one call that sends every attention call of a diffusers pipeline to the kernels of this pack."""

from __future__ import annotations

import copy
import functools
import logging
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from ..attention.policy import Policy, Rule
from ..measure.run_text import runs_text
from .alike import alike
from .models import models_of, places
from .process import switched_off
from .runs import Run
from .standing import NAME, Standing

log = logging.getLogger("attune")
SOURCE = "attune.apply"
_KEPT = 50
_NO_RUN = "There is no run to report yet: call the pipeline, and let the call end."
_OFF = "ATTUNE=off: the pack does nothing, and the pipeline is unchanged."


def run_data(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Runs as plain data, for JSON and for reports."""
    return [run.data() for run in runs]


class Handle:
    """Rules on a pipeline. `report()` tells what ran under them, `remove()` takes them away.

    `runs` are the calls of the pipeline since, the last 50. `models` names the models whose attention is covered.
    """

    def __init__(self, pipe: Any, policy: Policy, text_encoders: bool, foreign: str) -> None:
        self.policy = policy
        self.text_encoders = text_encoders
        self.foreign = foreign
        self.runs: deque[Run] = deque(maxlen=_KEPT)
        self._pipe = weakref.ref(pipe)
        self._standing: Standing | None = None
        self._remarks: list[str] = []

    @property
    def models(self) -> list[str]:
        """Names of the components that are covered."""
        return list(self._standing.hooks.models) if self._standing else []

    @property
    def notes(self) -> list[str]:
        """What was found while the pipeline was patched, for the user."""
        return [*self._remarks, *(self._standing.notes if self._standing else ())]

    def data(self) -> list[dict[str, Any]]:
        """The runs as plain data, for JSON."""
        runs = list(self.runs)
        if self._standing and (outside := self._standing.outside()):
            runs.append(outside)
        return run_data(runs)

    def report(self) -> str:
        """What ran, and why not what was asked for: a text of some lines for each call of the pipeline."""
        runs = self.data()
        said = {note for run in runs for note in run["notes"]}
        return runs_text(runs, [note for note in [*self.notes, *([] if runs else [_NO_RUN])] if note not in said])

    def remove(self) -> None:
        """Take these rules away; with the last of its handles gone the pipeline is as it was. Once is enough."""
        standing, self._standing = self._standing, None
        if standing is None:
            return
        self._remarks = list(standing.notes)
        standing.remove(self)
        if not standing.handles and (pipe := self._pipe()) is not None:
            if getattr(type(pipe), NAME, False):
                pipe.__class__ = standing.pipe_class
            vars(pipe).pop(NAME, None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _class_with_runs(kind: type) -> type:
    """A subclass that looks like `kind` and tells its object's Standing of every call. Only one object gets it."""

    original: Any = vars(kind).get("__call__") or kind.__call__

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        standing: Standing | None = vars(self).get(NAME)
        if standing is None:
            return original(self, *args, **kwargs)
        return standing.call(self, original, args, kwargs)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        memo[id(self)] = twin = object.__new__(kind)
        vars(twin).update({key: copy.deepcopy(value, memo) for key, value in vars(self).items() if key != NAME})
        return twin

    return alike(kind, __call__=__call__, __deepcopy__=__deepcopy__, **{NAME: True})


def _policy(kernel: str | Rule | Policy) -> Policy:
    if isinstance(kernel, (Policy, Rule)):
        rules = kernel.rules if isinstance(kernel, Policy) else (kernel,)
        return Policy(tuple(replace(rule, source=rule.source or SOURCE) for rule in rules))
    if not isinstance(kernel, str):
        raise TypeError(f"wanted the name of a kernel, a Rule or a Policy; found {kernel!r} ({type(kernel).__name__}).")
    return Policy((Rule((kernel,), source=SOURCE),))


def _check_pipeline(pipe: Any) -> None:
    kind = getattr(sys.modules.get("diffusers"), "DiffusionPipeline", None)  # not imported: it can be none of those
    if kind is not None and isinstance(pipe, kind):
        return
    found = f"{type(pipe).__module__}.{type(pipe).__qualname__}"
    hint = " Give the pipeline that the model belongs to." if isinstance(pipe, torch.nn.Module) else ""
    if not (callable(pipe) and hasattr(pipe, "components") and not isinstance(pipe, (type, torch.nn.Module))):
        raise TypeError(f"attune.apply wants a diffusers pipeline (an object, not its class); it got {found}.{hint}")


def apply(
    pipe: Any,
    kernel: str | Rule | Policy = "auto",
    *,
    text_encoders: bool = False,
    foreign: Literal["wrap", "leave"] = "wrap",
    quiet: bool = False,
) -> Handle:
    """Send every attention call of the pipeline's models to `kernel`: a name, a Rule, or a Policy of several rules.

    Covered are its UNet, transformers, ControlNets and VAE, with `text_encoders` also the encoders; what is put into
    the pipeline later is covered from its next call on. A kernel that cannot run, fails or gives NaN is replaced, and
    the handle's report says so. Rules of a later `apply` come before those of an earlier one, until its handle is
    removed.
    foreign: what to do with attention processors that are not diffusers' own plain ones (xformers, IP-Adapter, yours):
    "wrap" routes the calls they make, "leave" leaves them alone; either is said. quiet: a pipeline without attention is
    not worth a warning.

    Raises TypeError for what is no pipeline, UnknownKernelError (a ValueError) with the names for an unknown kernel.
    """
    policy = _policy(kernel)
    _check_pipeline(pipe)
    if foreign not in ("wrap", "leave"):
        raise ValueError(f"foreign={foreign!r} means nothing; wanted 'wrap' or 'leave'.")
    handle = Handle(pipe, policy, text_encoders, foreign)
    if switched_off():
        handle._remarks.append(_OFF)
        return handle
    standing: Standing | None = vars(pipe).get(NAME)
    if standing is not None and standing.pipe() is not pipe:  # a shallow copy has the dictionary, and the class
        del vars(pipe)[NAME]
        pipe.__class__, standing = standing.pipe_class, None
    if standing is None:
        if not any(places(model) for model in models_of(pipe).values()) and not text_encoders:
            text = f"no model of this {type(pipe).__name__} has an attention module that is known: it is unchanged."
            handle._remarks.append(text)
            log.log(logging.DEBUG if quiet else logging.WARNING, "Attune: %s", text)
            return handle
        standing = Standing(pipe)
        vars(pipe)[NAME] = standing
        pipe.__class__ = _class_with_runs(type(pipe))
    handle._standing = standing
    try:
        standing.add(handle)
    except BaseException:  # nobody would have a handle to take it away by
        handle.remove()
        raise
    return handle


@contextmanager
def applied(pipe: Any, kernel: str | Rule | Policy = "auto", **options: Any) -> Iterator[Handle]:
    """`apply` for the length of a `with` block."""
    handle = apply(pipe, kernel, **options)
    try:
        yield handle
    finally:
        handle.remove()
