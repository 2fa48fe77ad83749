"""The models of a pipeline, and the attention modules in them: found by what they have, not by their class's name."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .changes import compiled, wrapped

_CALLS = {"scaled_dot_product_attention", "dispatch_attention_fn"}
METHODS = ("forward", "decode", "encode")  # what pipelines call of a model
_OWN = ["query", "key", "value", "attention_mask"]
_PACKAGES = {"sage": "sage", "flash": "flash", "aiter": "flash", "xformers": "xformers"}
# Parts of a path in the order in which they run: a UNet registers its middle last.
_ORDER = {"down_blocks": 0, "transformer_blocks": 0, "mid_block": 1, "up_blocks": 2, "single_transformer_blocks": 2}


def models_of(pipe: Any, text_encoders: bool = False) -> dict[str, torch.nn.Module]:
    """The pipeline's models by the name of their component, lists of them one by one.

    Those of the package transformers (text and image encoders, safety checkers) only with `text_encoders`.
    """
    found: dict[str, torch.nn.Module] = {}
    for name, value in vars(pipe).items():
        many = isinstance(value, (list, tuple, torch.nn.ModuleList))
        for index, one in enumerate(value if many else [value]):
            if isinstance(one, torch.nn.Module) and (text_encoders or not is_encoder(one)):
                found[f"{name}[{index}]" if many else name] = one
    return found


def is_encoder(model: torch.nn.Module) -> bool:
    """Is it a model of transformers, or built on one?"""
    bases = type(bare(model)).__mro__  # peft's models have a base of transformers that is no module
    return any(
        base.__module__.partition(".")[0] == "transformers" for base in bases if issubclass(base, torch.nn.Module)
    )


def bare(model: Any) -> Any:
    """The module behind what torch.compile(model) or peft.get_peft_model(model, …) returns."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and callable(getattr(type(model), "get_base_model", None)):
            inner = model.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def is_compiled(model: torch.nn.Module) -> bool:
    """Was it, or a part of it, given to torch.compile?"""
    return any(
        "_orig_mod" in module._modules
        or getattr(module, "_compiled_call_impl", None) is not None
        or any(compiled(one) for name in METHODS for one in wrapped(vars(module).get(name)))
        for module in model.modules()
    )


def _names(code: CodeType) -> set[str]:
    """Every name that a function's code, or a function in it, mentions."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


@functools.cache  # a pipeline's modules are looked through at each of its calls
def _mentions(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return isinstance(code, CodeType) and bool(_CALLS & _names(code))


def _methods(kind: type) -> Iterator[FunctionType]:
    """A module's own methods and those that it inherits, but for what every module has."""
    for base in kind.__mro__:
        if base is not torch.nn.Module:
            yield from (one for one in vars(base).values() if isinstance(one, FunctionType))


def attends_itself(module: Any) -> bool:
    """Has it its own `_attention(query, key, value, attention_mask)` on (B·H, N, D) tensors, as ControlVideo's have?"""
    own = getattr(type(module), "_attention", None)
    if not (callable(own) and hasattr(module, "heads") and hasattr(module, "reshape_batch_dim_to_heads")):
        return False
    return list(inspect.signature(own).parameters)[1:5] == _OWN


def is_attention(module: Any) -> bool:
    """Does this module make attention calls, by one of the ways that are known?"""
    return (
        callable(getattr(module, "processor", None))
        or callable(getattr(module, "get_attention_scores", None))
        or attends_itself(module)
        or any(_mentions(one) for one in _methods(type(module)))
    )


@dataclass(frozen=True)
class Place:
    """An attention module in its model: its path, its block counted from 0, and how many blocks there are."""

    path: str
    module: Any
    block: int
    blocks: int


def _position(path: str) -> list[tuple[int, int | str]]:
    return [(_ORDER.get(part, 0), int(part) if part.isdigit() else 0) for part in path.split(".")]


def places(model: torch.nn.Module) -> list[Place]:
    """The model's attention modules, blocks numbered in the order in which they run: those with one parent are one."""
    found = [(path, module) for path, module in bare(model).named_modules() if is_attention(module)]
    parents = {path: path.rpartition(".")[0] for path, _ in found}
    order = sorted(dict.fromkeys(parents.values()), key=_position)  # stable: else as they are registered
    number = {parent: index for index, parent in enumerate(order)}
    return [Place(path, module, number[parents[path]], len(order)) for path, module in found]


def foreign(processor: Any) -> str:
    """What a processor that is not diffusers' plain one is called, for the user; "" for a plain one."""
    name, package = type(processor).__name__, type(processor).__module__.partition(".")[0]
    if "XFormers" in name:
        return f"{name} (xformers)"
    if "IPAdapter" in name:
        return f"{name} (IP-Adapter)"
    return "" if package == "diffusers" else f"{name} of {type(processor).__module__}"


def processor_of(module: torch.nn.Module) -> Any:
    """The module's attention processor, which may be a module itself; None where it has none."""
    found = vars(module).get("processor")
    return module._modules.get("processor") if found is None else found


def wants_gradients(model: torch.nn.Module, inputs: Any) -> bool:
    """May somebody ask for gradients of what this model makes of these inputs?"""
    if not torch.is_grad_enabled():
        return False
    given = (one for one in tree_leaves(inputs) if isinstance(one, torch.Tensor))
    return any(one.requires_grad for one in itertools.chain(given, model.parameters()))


def package_of(backend: Any) -> str:
    """Whose kernels a back end of diffusers calls, as `Machine.host_attention` names them; "" for PyTorch's own.

    backend: its name; None for the one that diffusers uses where none is named.
    """
    if backend is None:
        backend = sys.modules["diffusers.models.attention_dispatch"]._AttentionBackendRegistry._active_backend
    name = str(getattr(backend, "value", backend))
    if name.lstrip("_").startswith(("native", "flex", "attune")):
        return ""
    return next((package for word, package in _PACKAGES.items() if word in name), name)


def holders(module: Any) -> Iterator[Any]:
    """What holds the name of a dispatch back end for this module: its processor, or itself."""
    for one in (getattr(module, "processor", None), module):
        if one is not None and hasattr(one, "_attention_backend"):
            yield one
