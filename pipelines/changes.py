"""Attributes of a user's objects, changed for a while: each is put back as it was, also if it was not there."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

_MISSING: Any = object()
_OLD = "_old_forward"  # where accelerate keeps what stood at `forward` before its own hook


@dataclass
class _Change:
    thing: Any
    name: str
    before: Any  # _MISSING: it was not the object's own
    ours: Any


class Changes:
    """What was changed, in order. An object's own dictionary is written to, or which class it is of; never a class."""

    def __init__(self) -> None:
        self._made: list[_Change] = []
        _all.add(self)

    def set(self, thing: Any, name: str, value: Any) -> None:
        """Set `thing.name`. The value before is kept."""
        if name == "__class__":
            self._made.append(_Change(thing, name, type(thing), value))
            thing.__class__ = value
            return
        own = vars(thing)
        self._made.append(_Change(thing, name, own.get(name, _MISSING), value))
        own[name] = value

    def stands(self, thing: Any, name: str) -> bool:
        """Is what `set` put there still in force, perhaps behind another pipeline's hook, or one of accelerate?"""
        ours = [change.ours for change in self._made if change.thing is thing and change.name == name]
        for value in (vars(thing).get(name), vars(thing).get(_OLD) if name == "forward" else None):
            while value is not None:
                if any(value is one for one in ours):
                    return True
                value = getattr(value, "__wrapped__", None)
        return False

    def undo(self) -> list[str]:
        """Put everything back; the names of what somebody else has changed since, and was left as it is."""
        left = []
        for change in reversed(self._made):
            if change.name == "__class__":
                if type(change.thing) is change.ours:
                    change.thing.__class__ = change.before
                continue
            own, later = vars(change.thing), _later(change)
            if own.get(change.name, _MISSING) is change.ours:
                if change.before is _MISSING:
                    del own[change.name]
                else:
                    own[change.name] = change.before
            elif later is not None:  # another pipeline's hook stands on ours, and will put back what was before it
                later.before = change.before
            elif change.name == "forward" and own.get(_OLD, _MISSING) is change.ours:
                plain = getattr(type(change.thing), change.name).__get__(change.thing)
                own[_OLD] = plain if change.before is _MISSING else change.before
            else:
                left.append(f"{type(change.thing).__name__}.{change.name}")
        self._made.clear()
        return left


_all: weakref.WeakSet[Changes] = weakref.WeakSet()


def _later(change: _Change) -> _Change | None:
    """The change that was made on top of this one."""
    for changes in _all:
        for other in changes._made:
            if other.before is change.ours and other.thing is change.thing and other.name == change.name:
                return other
    return None
