"""Attributes of a user's objects, changed for a while: each is put back as it was, also if it was not there."""

from __future__ import annotations

from typing import Any

_MISSING: Any = object()
_OLD = "_old_forward"  # where accelerate keeps what stood at `forward` before its own hook


class Changes:
    """What was changed, in order. Only an object's own dictionary is written to, never its class."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, str, Any, Any]] = []  # object, name, before (_MISSING: not its own), ours

    def set(self, thing: Any, name: str, value: Any) -> None:
        """Set `thing.name`. The value before is kept."""
        own = vars(thing)
        self._made.append((thing, name, own.get(name, _MISSING), value))
        own[name] = value

    def stands(self, thing: Any, name: str) -> bool:
        """Is what `set` put there still in force, perhaps behind a hook of accelerate?"""
        ours = [value for one, known, _, value in self._made if one is thing and known == name]
        here = [vars(thing).get(name), vars(thing).get(_OLD) if name == "forward" else None]
        return any(value is found for value in ours for found in here)

    def undo(self) -> list[str]:
        """Put everything back; the names of what somebody else has changed since, and was left as it is."""
        left = []
        for thing, name, before, ours in reversed(self._made):
            own = vars(thing)
            if own.get(name, _MISSING) is ours:
                if before is _MISSING:
                    del own[name]
                else:
                    own[name] = before
            elif name == "forward" and own.get(_OLD, _MISSING) is ours:
                own[_OLD] = getattr(type(thing), name).__get__(thing) if before is _MISSING else before
            else:
                left.append(f"{type(thing).__name__}.{name}")
        self._made.clear()
        return left
