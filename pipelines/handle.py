"""`apply`: one call that sends every attention call of a diffusers pipeline to the kernels of this pack."""

from __future__ import annotations

import copy
import copyreg
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
_GONE = (
    "the pipeline was thrown away and took its hooks along: give the one that is called to attune.apply (one that is "
    "made of a patched pipeline's models, as by from_pipe, is patched by itself)"
)
_HEIR = "this pipeline was made of a patched one's models: it follows the same rules until their handle is removed"
_OFF = "ATTUNE=off: the pack does nothing, and the pipeline is unchanged."


def run_data(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Runs as plain data, for JSON and for reports."""
    return [run.data() for run in runs]


class Handle:
    """Rules on a pipeline. `report()` tells what ran under them, `remove()` takes them away.

    `runs` are the calls of the pipeline since, the last 50. `models` names the models whose attention is covered.
    Pipelines that are made of its models meanwhile, as by `from_pipe`, follow the same rules; their runs count, too.
    """

    def __init__(self, pipe: Any, policy: Policy, text_encoders: bool, foreign: Literal["wrap", "leave"]) -> None:
        self.policy = policy
        self.text_encoders = text_encoders
        self.foreign = foreign
        self.runs: deque[Run] = deque(maxlen=_KEPT)
        self._pipe = weakref.ref(pipe)
        self._standing: Standing | None = None
        self._remarks: list[str] = []
        # Handles of pipelines made of this one's models, and of theirs; each is kept alive by its pipeline.
        self._heirs: list[weakref.ref[Handle]] = []

    def _all(self) -> list[Handle]:
        return [self, *(heir for known in self._heirs if (heir := known()) is not None)]

    def _standings(self) -> list[Standing]:
        return [handle._standing for handle in self._all() if handle._standing is not None]

    @property
    def models(self) -> list[str]:
        """Names of the components that are covered."""
        return list(dict.fromkeys(name for standing in self._standings() for name in standing.hooks.models))

    @property
    def notes(self) -> list[str]:
        """What was found while the pipeline was patched, for the user."""
        standings = self._standings()
        gone = [_GONE] if standings and not any(standing.active for standing in standings) else []
        return list(dict.fromkeys([*self._remarks, *(note for one in standings for note in one.notes), *gone]))

    def data(self) -> list[dict[str, Any]]:
        """The runs as plain data, for JSON."""
        outside = (standing.outside() for standing in self._standings())
        return run_data([*self.runs, *(run for run in outside if run is not None)])

    def report(self) -> str:
        """What ran, and why not what was asked for: a text of some lines for each call of the pipeline."""
        runs = self.data()
        said = {note for run in runs for note in run["notes"]}
        return runs_text(runs, [note for note in [*self.notes, *([] if runs else [_NO_RUN])] if note not in said])

    def remove(self) -> None:
        """Take these rules away; with the last of its handles gone the pipeline is as it was. Once is enough."""
        for handle in self._all():
            handle._leave()

    def pass_on(self, pipe: Any) -> None:
        """Put the same rules on a pipeline that was made of this one's models, until this handle is removed."""
        heir = apply(pipe, self.policy, text_encoders=self.text_encoders, foreign=self.foreign, quiet=True)
        if heir._standing is None:
            return
        heir._standing.notes[_HEIR] = None
        heir.runs, heir._heirs = self.runs, self._heirs
        self._heirs[:] = [*(one for one in self._heirs if one() is not None), weakref.ref(heir)]  # theirs as well

    def _leave(self) -> None:
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

    def __copy__(self: Any) -> Any:  # as it would be without __reduce_ex__
        twin: Any = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __reduce_ex__(self: Any, _protocol: Any) -> Any:  # for pickle: unpatched
        state = {key: value for key, value in vars(self).items() if key != NAME}
        return copyreg._reconstructor, (kind, object, None), state  # type: ignore[attr-defined]

    special = {"__copy__": __copy__, "__deepcopy__": __deepcopy__, "__reduce_ex__": __reduce_ex__}
    return alike(kind, __call__=__call__, **special, **{NAME: True})


def _policy(kernel: str | Rule | Policy) -> Policy:
    if isinstance(kernel, (Policy, Rule)):
        rules = kernel.rules if isinstance(kernel, Policy) else (kernel,)
        return Policy(tuple(replace(rule, source=rule.source or SOURCE) for rule in rules))
    if not isinstance(kernel, str):
        several = f" Several, by preference: Rule({tuple(kernel)!r})." if isinstance(kernel, (list, tuple)) else ""
        found = f"{kernel!r} ({type(kernel).__name__})"
        raise TypeError(f"wanted the name of a kernel, a Rule or a Policy; found {found}.{several}")
    return Policy((Rule((kernel,), source=SOURCE),))


def _check_pipeline(pipe: Any) -> None:
    kind = getattr(sys.modules.get("diffusers"), "DiffusionPipeline", None)  # not imported: it can be none of those
    if kind is not None and isinstance(pipe, kind):
        return
    found = f"{type(pipe).__module__}.{type(pipe).__qualname__}"
    hint = " Give the pipeline that the model belongs to." if isinstance(pipe, torch.nn.Module) else ""
    if not (callable(pipe) and hasattr(pipe, "components") and not isinstance(pipe, (type, torch.nn.Module))):
        raise TypeError(f"attune.apply wants a diffusers pipeline (an object, not its class); it got {found}.{hint}")
    if not (hasattr(pipe, "__dict__") and type(pipe).__weakrefoffset__):
        raise TypeError(f"attune.apply has to keep a note on the pipeline; {found} has __slots__. Give it a __dict__.")


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
