"""Processors of diffusers whose own code calls SDPA: that call is exchanged, at no cost for the others they make."""

from __future__ import annotations

import dis
import functools
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from .alike import alike
from .calls import sdpa

QUICK = "_attune_quick"


def _functional() -> ModuleType:
    """torch.nn.functional as it is, but for its attention."""
    module = ModuleType(F.__name__)
    vars(module).update(vars(F))
    vars(module)["scaled_dot_product_attention"] = sdpa
    return module


def is_quick(processor: Any) -> bool:
    """Does its class come from `quick_class`?"""
    return getattr(type(processor), QUICK, False) is True


@functools.cache  # one class for all processors of a kind: compiled graphs are for one, too
def quick_class(kind: type) -> type | None:
    """A subclass of the processor class `kind` that looks like it, and whose calls of SDPA are routed.

    Its `__call__` is the same code; only the name F means something else in it. None where that is not how `kind`
    calls SDPA: its calls are caught as they are made (calls.Intercept), which costs a little for every operator.
    """
    call = vars(kind).get("__call__")
    if not isinstance(call, FunctionType) or call.__closure__ or kind.__module__.partition(".")[0] != "diffusers":
        return None
    names = set(call.__code__.co_names)
    if call.__globals__.get("F") is not F or not {"F", "scaled_dot_product_attention"} <= names:
        return None
    copy = FunctionType(call.__code__, {**call.__globals__, "F": _functional()}, call.__name__, call.__defaults__)
    copy.__kwdefaults__, copy.__doc__, copy.__annotations__ = call.__kwdefaults__, call.__doc__, call.__annotations__
    copy.__qualname__, copy.__module__ = call.__qualname__, call.__module__
    return alike(kind, __call__=copy, **{QUICK: True})


@functools.cache
def names_others(kind: type) -> bool:
    """Do processors of this class also call dispatch_attention_fn with a back end that is not their own?

    Qwen-Image 2.1's name None where they have a mask, whatever `set_attention_backend` was told.
    """
    code = getattr(kind.__call__, "__code__", None)
    used = [] if code is None else [one.argval for one in dis.get_instructions(code)]
    return used.count("dispatch_attention_fn") > used.count("_attention_backend") > 0


def without_xformers(module: Any) -> Any:
    """A new processor that does what the module's own does by xformers, by SDPA; None where there is none for sure."""
    from diffusers.models import attention_processor

    own = module.processor
    name = type(own).__name__.replace("XFormers", "") + "2_0"
    # One with weights cannot be made anew, and those of SDPA know no other scale than the usual.
    if isinstance(own, torch.nn.Module) or not getattr(module, "scale_qk", True):
        return None
    kind = getattr(attention_processor, name, None)
    return None if kind is None else kind()
