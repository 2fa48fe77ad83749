"""Processors of diffusers whose own code attends: that call is exchanged, at no cost for the others they make."""

from __future__ import annotations

import dis
import functools
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from .alike import alike
from .calls import sdpa
from .pending import MULTIPLIES, bmm

QUICK = "_attune_quick"
_PLAIN = "diffusers.models.attention_processor"


def _with(module: ModuleType, name: str, value: Any) -> ModuleType:
    """The module as it is, but for one name."""
    twin = ModuleType(module.__name__)
    vars(twin).update(vars(module))
    vars(twin)[name] = value
    return twin


@functools.cache
def _functional() -> ModuleType:
    return _with(F, "scaled_dot_product_attention", sdpa)


@functools.cache
def _torch() -> ModuleType:
    return _with(torch, "bmm", bmm)


def is_quick(processor: Any) -> bool:
    """Does its class come from `quick_class`?"""
    return getattr(type(processor), QUICK, False) is True


@functools.cache  # one class for all processors of a kind: compiled graphs are for one, too
def quick_class(kind: type) -> type | None:
    """A subclass of the processor class `kind` that looks like it, and whose calls of SDPA are routed.

    Its `__call__` is the same code; only the name F means something else in it, or the name torch in one that
    multiplies score tensors. None where that is not how `kind` attends: its calls of SDPA are caught as they are made
    (calls.Intercept), which costs a little for every operator.
    """
    call = vars(kind).get("__call__")
    if not isinstance(call, FunctionType) or call.__closure__ or kind.__module__.partition(".")[0] != "diffusers":
        return None
    names, known = set(call.__code__.co_names), call.__globals__
    meant: dict[str, Any] = {}
    if {"F", "scaled_dot_product_attention"} <= names and known.get("F") is F:
        meant["F"] = _functional()
    # Those of some pipelines also look at the scores.
    multiplies = {"get_attention_scores", "bmm"} <= names and kind.__module__ == _PLAIN and known.get("torch") is torch
    if multiplies and not {"scaled_dot_product_attention", "dispatch_attention_fn"} & names:
        meant["torch"] = _torch()
    if not meant:
        return None
    copy = FunctionType(call.__code__, {**known, **meant}, call.__name__, call.__defaults__)
    copy.__kwdefaults__, copy.__doc__, copy.__annotations__ = call.__kwdefaults__, call.__doc__, call.__annotations__
    copy.__qualname__, copy.__module__ = call.__qualname__, call.__module__
    return alike(kind, __call__=copy, **{QUICK: True, MULTIPLIES: "torch" in meant})


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
