"""Classes that take the place of another for one object, and pass for it wherever classes are compared."""

from __future__ import annotations

from typing import Any

_FOR = "_attune_for"  # the class that a class of ours stands for


def _plain(kind: Any) -> Any:
    return vars(kind).get(_FOR, kind) if isinstance(kind, _Alike) else kind


class _Alike(type):
    """Equal to the class it stands for, also as a key: diffusers asks `processor.__class__ in (…)` before it acts.

    Called, it makes an object of that class: what diffusers makes by `processor.__class__()` is nothing of ours.
    """

    def __eq__(cls, other: object) -> bool:
        return _plain(other) is _plain(cls)

    def __hash__(cls) -> int:
        return hash(_plain(cls)) if _FOR in vars(cls) else type.__hash__(cls)

    def __instancecheck__(cls, thing: Any) -> bool:
        return isinstance(thing, _plain(cls)) if _FOR in vars(cls) else super().__instancecheck__(thing)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, _plain(cls)) if _FOR in vars(cls) else super().__subclasscheck__(kind)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _plain(cls)(*args, **kwargs) if _FOR in vars(cls) else super().__call__(*args, **kwargs)


def alike(kind: type, **about: Any) -> type:
    """A subclass of `kind` with its name and `about` as attributes; `==` does not tell it from `kind`."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, _FOR: kind}
    meta = type("Alike", (_Alike, type(kind)), {"__hash__": _Alike.__hash__})
    return meta(kind.__name__, (kind,), {**names, **about})
