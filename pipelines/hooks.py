"""The hooks on a pipeline's models: on each model's forward, and on what its attention modules call."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.compiler import is_compiling

from ..attention.session import BUSY, CURRENT
from . import dispatch
from .calls import PLACE, Intercept, intercepted, own_attention
from .changes import LOCK, Changes, changeable, original
from .models import (
    METHODS,
    Place,
    attends_itself,
    bare,
    foreign,
    holders,
    is_compiled,
    is_encoder,
    package_of,
    places,
    processor_of,
)
from .pending import pending_scores
from .process import machine, verdicts
from .processors import is_quick, names_others, quick_class, without_xformers

log = logging.getLogger("attune")
_XFORMERS = "_use_memory_efficient_attention_xformers"
_XFORMERS_CALL = "_memory_efficient_attention_xformers"
_BACKEND = "_attention_backend"
Watch = Callable[[torch.nn.Module, Callable[..., Any], bool], Callable[..., Any]]


class _Spot:
    """One attention module as it is hooked. `options`: its block, and the back end it had before, as calls.PLACE.

    `seen`: how the module was when its processor was hooked. `alone`: the user wants its processor left alone.
    """

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name = name  # of the pipeline's component
        self.module = weakref.ref(module)
        self.options: dict[str, Any] = {"backend": None}
        self.seen: Any = None
        self.alone = False
        self.elsewhere = False  # its processor names other back ends than its own, too
        self.by_backend = False  # its processor names a back end of diffusers

    def state(self) -> Any:
        """What of the module a user may set at any time. Asked before each forward: it has to be quick."""
        module = self.module()
        if module is None:
            return self.seen
        own, processor = vars(module), processor_of(module)
        theirs = getattr(processor, "__dict__", None)
        backend = getattr(processor, _BACKEND, None) if theirs is None else theirs.get(_BACKEND)
        # Not the classes themselves: one of ours is equal to the one it stands for.
        which = id(processor), id(type(processor))
        return (*which, backend, own.get(_BACKEND), own.get("_slice_size"), own.get(_XFORMERS))


class Hooks:
    """What was hooked on one pipeline. It keeps no model alive.

    watch: makes of a model's forward (and whether its SDPA calls have to be caught wherever they are made) one that is
    watched. say: tells the user. wrap_foreign: are processors that are not diffusers' own hooked as well?
    """

    def __init__(self, watch: Watch, say: Callable[[str], None], wrap_foreign: bool) -> None:
        self._watch, self._say, self.wrap_foreign = watch, say, wrap_foreign
        self._named: dict[str, weakref.ref[torch.nn.Module]] = {}
        self._active = True
        self._changes = Changes()
        # The attention modules of each model that is hooked; an encoder's are not known.
        self._spots: weakref.WeakKeyDictionary[torch.nn.Module, list[_Spot]] = weakref.WeakKeyDictionary()

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """The pipeline's models that are hooked, by the name of their component."""
        return {name: model for name, known in list(self._named.items()) if (model := known()) is not None}

    def stand(self, found: Mapping[str, torch.nn.Module]) -> None:
        """Hook these models, by the name of their component; what is hooked already is left alone."""
        with LOCK:
            fresh = [self._hook_model(name, model) for name, model in found.items()]
            self._named = {name: weakref.ref(model) for name, model in found.items() if bare(model) in self._spots}
            if any(fresh) and any(is_compiled(model) for model in self.models.values()):
                self._trace_anew()

    def look(self, model: torch.nn.Module) -> None:
        """Before a forward of this model: has anybody set processors or back ends since? They are hooked, too."""
        spots = self._spots.get(model, [])
        if all(spot.seen == spot.state() for spot in spots):
            return
        with LOCK:
            if any([self._settle(spot) for spot in spots]) and is_compiled(model):
                self._trace_anew()

    def _trace_anew(self) -> None:
        torch.compiler.reset()  # graphs from before know nothing of the hooks
        self._say("a model of this pipeline is compiled: its graphs are traced anew, once")

    def _hook_model(self, name: str, model: torch.nn.Module) -> bool:
        """True where something was hooked that a graph would know of."""
        inner, encoder = bare(model), is_encoder(model)
        found = [] if encoder else places(inner)
        if not found and not encoder:
            return False
        fresh = inner not in self._spots
        known = {id(spot.module()): spot for spot in self._spots.get(inner, [])}
        self._spots[inner] = spots = []
        for place in found:
            spot = known.get(id(place.module)) or _Spot(name, place.module)
            spot.options |= {"block_index": place.block, "total_blocks": place.blocks}
            spots.append(spot)
            hooked = [self._hook_attention(spot, place), self._settle(spot)]
            fresh |= any(hooked)
        points = [(model, "forward")]
        if getattr(inner, "_compiled_call_impl", None) is not None:  # model.compile(): that is called instead
            points = [(inner, "_compiled_call_impl")]
        points += [(inner, method) for method in METHODS[1:] if callable(getattr(inner, method, None))]
        for thing, method in points:
            self._hook(thing, method, lambda theirs: self._watch(inner, theirs, encoder))
        return fresh

    def _hook(self, thing: Any, name: str, ours: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
        """Put `ours(thing.name)` in the place of `thing.name`, unless it stands there already."""
        if not callable(getattr(thing, name, None)) or self._changes.stands(thing, name):
            return False
        self._changes.set(thing, name, ours(getattr(thing, name)))
        return True

    def _hook_attention(self, spot: _Spot, place: Place) -> bool:
        """What an attention module does by itself, whatever its processor."""
        module: Any = place.module
        hooked = [self._hook(module, "get_attention_scores", functools.partial(pending_scores, module))]
        if attends_itself(module):
            instead = functools.partial(own_attention, module)
            hooked += [self._hook(module, name, instead) for name in ("_attention", _XFORMERS_CALL)]
        hooked.append(self._hook(module, "forward", functools.partial(self._placed, module, spot)))
        return any(hooked)

    def _settle(self, spot: _Spot) -> bool:
        """What the user may set at any time: the module's processor, its back end, slicing, xformers."""
        if (module := spot.module()) is None or spot.seen == spot.state():
            return False
        self._hook_processor(spot, module)
        if attends_itself(module) and not spot.alone:
            self._switch_off(spot, module)
        spot.seen = spot.state()
        return True

    def _hook_processor(self, spot: _Spot, module: Any) -> None:
        name, processor = spot.name, processor_of(module)
        theirs = foreign(processor) if callable(processor) else ""
        spot.alone, spot.by_backend = bool(theirs) and not self.wrap_foreign, False
        if spot.alone:
            self._say(f"{name} has processors that diffusers does not set by itself, {theirs}: they are left alone")
            return
        if "xformers" in theirs:
            plain = without_xformers(module)
            if plain is None:
                spot.alone = True
                self._say(f"{name} has {theirs}, for which there is no plain processor: it is left alone")
                return
            self._changes.set(module, "processor", plain)
            self._say(f"{name} was set to xformers ({theirs}): this pack's kernels compute its attention meanwhile")
        elif theirs:
            self._say(f"{name} has processors of another kind, {theirs}: their calls of SDPA are routed, they stay")
        for holder in holders(module):
            fixed = not changeable(holder, _BACKEND)
            own = holder._attention_backend if fixed else original(holder, _BACKEND)
            if "flex" in str(getattr(own, "value", own)):
                # Its masks are BlockMasks, which no other back end reads; some processors raise where it is not named.
                self._say(f"{name} names diffusers' back end flex for some of its modules: their attention stays that")
                continue
            if fixed:  # what it names cannot be exchanged: its calls are caught where they reach SDPA
                if package := package_of(own):
                    self._say(
                        f"{name} names {package} in {type(holder).__name__}, whose __slots__ or properties cannot be "
                        "exchanged: its attention stays that. Give it the back end native, and it is routed"
                    )
                continue
            if (member := dispatch.register(self)) is None:
                break
            # A processor may serve many modules, and a model many pipelines.
            spot.options["backend"], spot.by_backend = own, True
            if holder._attention_backend is not member:
                self._changes.set(holder, _BACKEND, member)
        processor = processor_of(module)
        spot.elsewhere = names_others(type(processor))
        if not is_quick(processor) and (quick := quick_class(type(processor))) is not None:
            self._changes.set(processor, "__class__", quick)

    def _switch_off(self, spot: _Spot, module: Any) -> None:
        """A module with its own `_attention`: what leads around that."""
        name = spot.name
        if getattr(module, "_slice_size", None) is not None:
            self._changes.set(module, "_slice_size", None)
            self._say(f"{name} slices attention by itself: switched off meanwhile (the kernel `split` is the same)")
        if getattr(module, _XFORMERS, False) and not self._xformers_works():
            self._changes.set(module, _XFORMERS, False)
            self._say(f"{name} uses xformers, which is not proved to work on this machine: switched off meanwhile")

    def _xformers_works(self) -> bool:
        known = verdicts().known(machine().main_device.name)
        return any(known[name].works for name in ("xformers", "xformers_cutlass") if name in known)

    def own(self) -> str:
        """What these models compute attention with by themselves, as `Machine.host_attention`; "": plain PyTorch."""
        spots = [spot for known in list(self._spots.values()) for spot in known if spot.by_backend and not spot.alone]
        found = {package_of(spot.options["backend"]) for spot in spots}
        return next((one for one in ("sage", "flash", "xformers") if one in found), max(found, default=""))

    def _placed(self, module: Any, spot: _Spot, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """An attention module's forward that says which block it is, and catches its calls of SDPA."""

        @functools.wraps(theirs, updated=())
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return theirs(*args, **kwargs)
            # Processors that send their calls to us by themselves; those of others are caught.
            sends = any(holder._attention_backend == dispatch.NAME for holder in holders(module))
            sends = sends and not spot.elsewhere
            sends = sends or spot.alone or is_quick(getattr(module, "processor", None))
            if is_compiling():
                with nullcontext() if sends else Intercept():  # which no graph keeps any state of
                    return theirs(*args, **kwargs)
            now = CURRENT.get()
            routed = now is not None and now.router is not None
            busy = CURRENT.set(BUSY) if routed and spot.alone else None
            token = PLACE.set(spot.options)
            try:
                with intercepted() if routed and not sends else nullcontext():
                    return theirs(*args, **kwargs)
            finally:
                PLACE.reset(token)
                if busy is not None:
                    CURRENT.reset(busy)

        return forward

    def fall(self, dead: bool = False) -> None:
        """Take every hook away; everything is as it was. `dead`: the pipeline is gone, and nobody is to be told."""
        with LOCK:
            self._active = False
            anew = not dead and any(is_compiled(model) for model in self.models.values())
            left = self._changes.undo()
            dispatch.unregister(self)
            self._spots.clear()
            if anew:
                torch.compiler.reset()
        if left and not dead:
            log.warning(
                "Attune: %s changed since it was patched, and is left as it is; what is ours in there does nothing "
                "any more.",
                ", ".join(dict.fromkeys(left)),
            )
