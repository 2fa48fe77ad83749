"""Pipelines that are made of a patched one's models (`from_pipe`, `Other(**pipe.components)`): they are patched, too.

What a user has done to the models comes with them: LoRAs, processors, torch.compile. So do the rules of `apply`.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch

from .changes import LOCK
from .models import bare, models_of

log = logging.getLogger("attune")
_METHOD = "register_modules"  # by which every pipeline is given its models
_users: list[Any] = []  # the Standings of all patched pipelines, in the order in which they came
_changed: list[tuple[type, Any, Any]] = []  # (class, its method before, ours)


def watch(user: Any) -> None:
    """From now on pipelines that are given models of `user`, a Standing, follow its handles."""
    kind = getattr(sys.modules.get("diffusers"), "DiffusionPipeline", None)
    with LOCK:
        _users.append(user)
        if _changed or kind is None:
            return
        original = vars(kind)[_METHOD]

        @functools.wraps(original)
        def register(self: Any, *args: Any, **kwargs: Any) -> None:
            fresh = not _shared({name: one for name, one in vars(self).items() if isinstance(one, torch.nn.Module)})
            original(self, *args, **kwargs)
            if fresh:
                _adopt(self)

        setattr(kind, _METHOD, register)
        _changed.append((kind, original, register))


def unwatch(user: Any) -> None:
    """`user` is patched no more; the last one puts diffusers' method back."""
    with LOCK:
        if user in _users:
            _users.remove(user)
        # Where somebody else's stands on ours it stays, and does nothing until the next pipeline is patched.
        if not _users and _changed and vars(_changed[0][0])[_METHOD] is _changed[0][2]:
            kind, original, _ = _changed.pop()
            setattr(kind, _METHOD, original)


def _shared(models: Mapping[str, torch.nn.Module]) -> set[int]:
    """What makes a pipeline one of another's models: not its VAE, which any two may have in common."""
    inner = [bare(model) for model in models.values()]
    return {id(model) for model in inner if not callable(getattr(model, "decode", None))}


def _adopt(pipe: Any) -> None:
    """Let a new pipeline follow the handles of the one that has its models; of several, the one patched last."""
    try:
        users, own = list(_users), _shared(models_of(pipe))
        if any(user.pipe() is pipe for user in users):  # patched as it was made
            return
        for user in reversed(users):
            if own & _shared(user.hooks.models):
                for handle in list(user.handles):
                    handle.pass_on(pipe)
                return
    except Exception:  # whoever makes a pipeline must get it
        log.exception("A pipeline made of a patched one's models could not be patched as that is")
