"""The hooks on a pipeline's models: on each model's forward, and on what its attention modules call."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.compiler import is_compiling

from ..attention.session import CURRENT
from . import dispatch
from .calls import PLACE, Intercept, intercepted, own_attention
from .changes import Changes
from .models import Place, attends_itself, bare, foreign, holders, is_compiled, is_encoder, places
from .pending import pending_scores
from .process import machine, verdicts
from .processors import is_quick, quick_class, without_xformers

log = logging.getLogger("attune")
_XFORMERS = "_use_memory_efficient_attention_xformers"
_XFORMERS_CALL = "_memory_efficient_attention_xformers"
_WITHOUT_FORWARD = ("decode", "encode")  # what pipelines call of a VAE
Watch = Callable[[Callable[..., Any], bool], Callable[..., Any]]


class Hooks:
    """What was hooked on one pipeline. `models`: those of now, by the name of their component.

    watch: makes of a model's forward (and whether its SDPA calls have to be caught wherever they are made) one that is
    watched. say: tells the user. wrap_foreign: are processors that are not diffusers' own hooked as well?
    """

    def __init__(self, watch: Watch, say: Callable[[str], None], wrap_foreign: bool) -> None:
        self._watch, self._say, self._wrap_foreign = watch, say, wrap_foreign
        self.models: dict[str, torch.nn.Module] = {}
        self._active = True
        self._changes = Changes()
        self._hooked: list[Any] = []  # models whose attention modules are hooked
        self._lock = threading.RLock()

    def stand(self, found: Mapping[str, torch.nn.Module]) -> None:
        """Hook these models, by the name of their component; what is hooked already is left alone."""
        with self._lock:
            fresh = False
            for name, model in found.items():
                fresh |= self._hook_model(name, model)
            self.models = {name: model for name, model in found.items() if bare(model) in self._hooked}
            if fresh and any(is_compiled(model) for model in self.models.values()):
                torch.compiler.reset()  # graphs from before know nothing of the hooks
                self._say("a model of this pipeline is compiled: its graphs are traced anew, once")

    def _hook_model(self, name: str, model: torch.nn.Module) -> bool:
        """True where something was hooked now."""
        inner, encoder = bare(model), is_encoder(model)
        fresh = not any(one is inner for one in self._hooked)
        if fresh:
            found = [] if encoder else places(inner)
            if not found and not encoder:
                return False
            for place in found:
                self._hook_attention(name, place)
            self._hooked.append(inner)
        points = [(model, "forward")]
        if getattr(inner, "_compiled_call_impl", None) is not None:  # model.compile(): that is called instead
            points = [(inner, "_compiled_call_impl")]
        points += [(inner, method) for method in _WITHOUT_FORWARD if callable(getattr(inner, method, None))]
        for thing, method in points:
            if not self._changes.stands(thing, method):
                self._changes.set(thing, method, self._watch(getattr(thing, method), encoder))
                fresh = True
        return fresh

    def _hook_attention(self, name: str, place: Place) -> None:
        module, before = place.module, None
        theirs = foreign(getattr(module, "processor", None)) if callable(getattr(module, "processor", None)) else ""
        if theirs and not self._wrap_foreign:
            self._say(f"{name} has processors that diffusers does not set by itself, {theirs}: they are left alone")
            return
        if "xformers" in theirs:
            plain = without_xformers(module)
            if plain is None:
                self._say(f"{name} has {theirs}, for which there is no plain processor: it is left alone")
                return
            self._changes.set(module, "processor", plain)
            self._say(f"{name} was set to xformers ({theirs}): this pack's kernels compute its attention meanwhile")
        elif theirs:
            self._say(f"{name} has processors of another kind, {theirs}: their calls of SDPA are routed, they stay")
        member = dispatch.backend() if not any(True for _ in holders(module)) else dispatch.register(self)
        for holder in holders(module) if member is not None else ():
            if holder._attention_backend is not member:
                before = holder._attention_backend
                self._changes.set(holder, "_attention_backend", member)
        processor = getattr(module, "processor", None)
        if not is_quick(processor) and (quick := quick_class(type(processor))) is not None:
            self._changes.set(processor, "__class__", quick)
        if callable(getattr(module, "get_attention_scores", None)):
            self._changes.set(module, "get_attention_scores", pending_scores(module, module.get_attention_scores))
        if attends_itself(module):
            self._take_over(name, module)
        self._changes.set(module, "forward", self._placed(module, place, before))

    def _take_over(self, name: str, module: Any) -> None:
        """A module with its own `_attention`: that is replaced, and what leads around it is switched off."""
        self._changes.set(module, "_attention", own_attention(module, module._attention))
        if getattr(module, "_slice_size", None) is not None:
            self._changes.set(module, "_slice_size", None)
            self._say(f"{name} slices attention by itself: switched off meanwhile (the kernel `split` is the same)")
        if callable(getattr(module, _XFORMERS_CALL, None)):
            self._changes.set(module, _XFORMERS_CALL, own_attention(module, getattr(module, _XFORMERS_CALL)))
        if getattr(module, _XFORMERS, False) and not self._xformers_works():
            self._changes.set(module, _XFORMERS, False)
            self._say(f"{name} uses xformers, which is not proved to work on this machine: switched off meanwhile")

    def _xformers_works(self) -> bool:
        known = verdicts().known(machine().main_device.name)
        return any(known[name].works for name in ("xformers", "xformers_cutlass") if name in known)

    def _placed(self, module: Any, place: Place, backend: Any) -> Callable[..., Any]:
        """An attention module's forward that says which block it is, and catches its calls of SDPA."""
        original = module.forward
        options = {"block_index": place.block, "total_blocks": place.blocks, "backend": backend}

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            # Processors that send their calls to us by themselves; those of others are caught.
            sends = any(holder._attention_backend == dispatch.NAME for holder in holders(module))
            sends = sends or is_quick(getattr(module, "processor", None))
            if is_compiling():
                with nullcontext() if sends else Intercept():  # which no graph keeps any state of
                    return original(*args, **kwargs)
            now = CURRENT.get()
            if now is None or now.router is None:
                return original(*args, **kwargs)
            token = PLACE.set(options)
            try:
                with nullcontext() if sends else intercepted():
                    return original(*args, **kwargs)
            finally:
                PLACE.reset(token)

        return forward

    def fall(self) -> None:
        """Take every hook away; everything is as it was."""
        with self._lock:
            self._active = False
            compiled = any(is_compiled(model) for model in self.models.values())
            left = self._changes.undo()
            dispatch.unregister(self)
            self._hooked.clear()
            if compiled:
                torch.compiler.reset()
        if left:
            log.warning(
                "Attune: %s changed since it was patched, and is left as it is; what is ours in there does nothing "
                "any more.",
                ", ".join(dict.fromkeys(left)),
            )
