"""Attributes of a user's objects, changed for a while: each is put back as it was, also if it was not there."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MISSING: Any = object()
_OLD = "_old_forward"  # where accelerate keeps what stood at `forward` before its own hook
_KEPT = "__deepcopy__"
LOCK = threading.RLock()  # models may be shared by the pipelines of several threads


@dataclass(eq=False)
class _Change:
    owner: Changes
    name: str
    before: Any  # _MISSING: it was not the object's own
    ours: Any


class _Kept:
    """What was changed on one object, in order. It stands in that object's own dictionary, as its `__deepcopy__`.

    So nothing outside the object keeps it, or what it held, alive; and a copy has what was there before.
    """

    def __init__(self, thing: Any) -> None:
        self.thing = weakref.ref(thing)
        self.made: list[_Change] = []
        self._before = vars(thing).get(_KEPT, _MISSING)
        vars(thing)[_KEPT] = self

    def leave(self, thing: Any) -> None:
        if self._before is _MISSING:
            vars(thing).pop(_KEPT, None)
        else:
            vars(thing)[_KEPT] = self._before

    def __call__(self, memo: dict[int, Any]) -> Any:
        """A deep copy of the object, unchanged."""
        thing = self.thing()
        with LOCK:
            self.leave(thing)
            try:
                twin = copy.deepcopy(thing, memo)
            finally:
                vars(thing)[_KEPT] = self
            for change in reversed(self.made):
                before = change.before if change.before is _MISSING else copy.deepcopy(change.before, memo)
                _put_back(twin, _Change(change.owner, change.name, before, change.ours), [])
        return twin


def _kept(thing: Any) -> _Kept | None:
    found = vars(thing).get(_KEPT)
    # A shallow copy of an object has its dictionary.
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
        """Is what `set` put there still in force, perhaps behind another pipeline's hook, or one of accelerate?"""
        kept = _kept(thing)
        ours = [one.ours for one in kept.made if one.owner is self and one.name == name] if kept else []
        for value in (vars(thing).get(name), vars(thing).get(_OLD) if name == "forward" else None):
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
    if now is change.ours:
        if before is _MISSING:
            del own[name]
        else:
            own[name] = before
    elif later is not None:  # another pipeline's hook stands on ours, and will put back what was before it
        later.before = before
    elif name == "forward" and own.get(_OLD, _MISSING) is change.ours:
        own[_OLD] = type(thing).forward.__get__(thing) if before is _MISSING else before
        if getattr(now, "__wrapped__", None) is change.ours:
            now.__wrapped__ = own[_OLD]
    else:
        return now is _MISSING or not any(one is change.ours for one in wrapped(now))
    return True
