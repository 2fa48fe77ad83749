"""Attributes of a user's objects, changed for a while: each is put back as it was, also if it was not there."""

from __future__ import annotations

import copy
import copyreg
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MISSING: Any = object()
_OLD = "_old_forward"  # where accelerate keeps what stood at `forward` before its own hook
_HOOKS = "_diffusers_hook"  # where diffusers keeps what stood there before hooks of its own (caching, group offloading)
_KEPT, _REDUCED = "__deepcopy__", "__reduce_ex__"
LOCK = threading.RLock()  # models may be shared by the pipelines of several threads


@dataclass(eq=False)
class _Change:
    owner: Changes
    name: str
    before: Any  # _MISSING: it was not the object's own
    ours: Any


class _Kept:
    """What was changed on one object, in order. It stands in that object's own dictionary, as its `__deepcopy__`.

    So nothing outside the object keeps it, or what it held, alive; and a copy, or a pickle, has what was there before.
    """

    def __init__(self, thing: Any) -> None:
        self.thing = weakref.ref(thing)
        self.made: list[_Change] = []
        self._before = {name: vars(thing).get(name, _MISSING) for name in (_KEPT, _REDUCED)}
        vars(thing).update({_KEPT: self, _REDUCED: self._reduced})

    def leave(self, thing: Any) -> None:
        for name, before in self._before.items():
            _restore(vars(thing), name, before)

    def __call__(self, memo: dict[int, Any]) -> Any:
        """A deep copy of the object, unchanged."""
        thing = self.thing()
        with LOCK:
            ours = {name: vars(thing)[name] for name in self._before}
            self.leave(thing)
            try:
                twin = copy.deepcopy(thing, memo)
            finally:
                vars(thing).update(ours)
            for change in reversed(self.made):
                before = change.before if change.before is _MISSING else copy.deepcopy(change.before, memo)
                _put_back(twin, _Change(change.owner, change.name, before, change.ours), [])
        return twin

    def _reduced(self, protocol: Any) -> Any:
        """The object as pickle wants it (torch.save), unchanged: whoever loads it need not have this pack."""
        thing: Any = self.thing()
        with LOCK:
            kind: Any = type(thing)
            found = kind.__reduce_ex__(thing, protocol)
            if not (isinstance(found, tuple) and len(found) > 2 and isinstance(found[2], dict)):
                return found  # a way of its own
            make, arguments, state = found[0], found[1], dict(found[2])
            for change in reversed(self.made):
                if change.name == "__class__":
                    kind = change.before
                elif state.get(change.name) is change.ours:
                    _restore(state, change.name, change.before)
            for name, before in self._before.items():
                _restore(state, name, before)
        if kind is not type(thing):  # pickle takes no other class with what is there by default
            make, arguments = copyreg._reconstructor, (kind, object, None)  # type: ignore[attr-defined]
        return make, arguments, state, *found[3:]


def _restore(names: dict[str, Any], name: str, before: Any) -> None:
    if before is _MISSING:
        names.pop(name, None)
    else:
        names[name] = before


def _kept(thing: Any) -> _Kept | None:
    found = vars(thing).get(_KEPT)
    # A copy of its dictionary alone, as DataParallel makes it, has this too.
    return found if isinstance(found, _Kept) and found.thing() is thing else None


class Changes:
    """What one pipeline has changed: an object's own dictionary, or which class an object is of; never a class."""

    def __init__(self) -> None:
        self._things: dict[int, weakref.ref[Any]] = {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> Changes:
        return self

    def set(self, thing: Any, name: str, value: Any) -> None:
        """Set `thing.name`. The value before is kept; it takes the place of what was kept by an earlier `set`."""
        with LOCK:
            kept = _kept(thing) or _Kept(thing)
            self._things[id(thing)] = kept.thing
            for old in [one for one in kept.made if one.owner is self and one.name == name]:
                kept.made.remove(old)
            if name == "__class__":
                kept.made.append(_Change(self, name, type(thing), value))
                thing.__class__ = value
            else:
                kept.made.append(_Change(self, name, vars(thing).get(name, _MISSING), value))
                vars(thing)[name] = value

    def stands(self, thing: Any, name: str) -> bool:
        """Is what `set` put there still in force, perhaps behind another's hook (see `_behind`)?"""
        kept = _kept(thing)
        ours = [one.ours for one in kept.made if one.owner is self and one.name == name] if kept else []
        for names, key in [(vars(thing), name), *_behind(thing, name)]:
            value = names.get(key)
            for one in wrapped(value):
                if any(one is our for our in ours):
                    return True
                if compiled(one):  # what is in there is traced, and does nothing by itself
                    break
        return False

    def undo(self) -> list[str]:
        """Put everything back; the names of what somebody else has changed since, and was left as it is."""
        left = []
        with LOCK:
            for thing in [reference() for reference in reversed(self._things.values())]:
                kept = None if thing is None else _kept(thing)
                if kept is None:
                    continue
                for change in [one for one in reversed(kept.made) if one.owner is self]:
                    kept.made.remove(change)
                    if not _put_back(thing, change, kept.made):
                        left.append(f"{type(thing).__name__}.{change.name}")
                if not kept.made:
                    kept.leave(thing)
            self._things.clear()
        return left


def changeable(thing: Any, name: str) -> bool:
    """Does `thing.name` stand in a dictionary of its own? Not with `__slots__`, or where its class answers first."""
    kind = type(thing)
    kept = hasattr(thing, "__dict__") and bool(kind.__weakrefoffset__)
    return kept and not hasattr(type(getattr(kind, name, None)), "__set__")


def original(thing: Any, name: str) -> Any:
    """`thing.name` as the user has it, whatever pipelines have put in its place."""
    kept, value = _kept(thing), vars(thing).get(name, _MISSING)
    for change in reversed(kept.made if kept else ()):
        if change.name == name and change.ours is value:
            value = change.before
    return getattr(type(thing), name, None) if value is _MISSING else value


def wrapped(value: Any) -> Iterator[Any]:
    """A function, and what it wraps, outermost first."""
    while value is not None:
        yield value
        value = getattr(value, "__wrapped__", None)


def compiled(function: Any) -> bool:
    """Did torch.compile make this function?"""
    return hasattr(function, "_torchdynamo_orig_callable")


def _behind(thing: Any, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(dictionary, key) of what is called behind the hooks that accelerate and diffusers have put on `forward`."""
    if name != "forward":
        return
    yield vars(thing), _OLD
    for reference in getattr(vars(thing).get(_HOOKS), "_fn_refs", ()):
        yield vars(reference), "forward"
        yield vars(reference), "original_forward"


def _put_back(thing: Any, change: _Change, others: list[_Change]) -> bool:
    """Put one change back; False where what stands there now is somebody else's, with ours in it."""
    name, before = change.name, change.before
    if name == "__class__":
        if type(thing) is change.ours:
            thing.__class__ = before
        return True
    own = vars(thing)
    now = own.get(name, _MISSING)
    later = next((one for one in others if one.name == name and one.before is change.ours), None)
    behind = [(names, key) for names, key in _behind(thing, name) if names.get(key) is change.ours]
    if now is change.ours:
        _restore(own, name, before)
    elif later is not None:  # another pipeline's hook stands on ours, and will put back what was before it
        later.before = before
    elif behind:
        inner = getattr(type(thing), name).__get__(thing) if before is _MISSING else before
        for names, key in behind:
            names[key] = inner
        for one in wrapped(now):
            if getattr(one, "__wrapped__", None) is change.ours:
                one.__wrapped__ = inner
    else:
        return now is _MISSING or not any(one is change.ours for one in wrapped(now))
    return True
