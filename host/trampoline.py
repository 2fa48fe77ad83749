"""Reach attention calls that carry no `transformer_options`.

About half of ComfyUI's call sites (PixArt, HunyuanDiT, parts of Wan animate, …) call `optimized_attention` without
options, so the override on the model never hears of them. Every such function is wrapped by `wrap_attn`, whose closure
holds the real one in a cell named `func`. While a run with a router is in progress, and only then, that cell holds a
trampoline: it asks whether this thread is inside a routed forward, and if not calls the real function.

Changing the cell also does something that is needed under `torch.compile`: a graph compiled before the node was there
(or after it went) guards on the cell, so it is traced anew instead of never asking.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch

from ..attention import compiled
from ..attention.compiled import INNER, traced_attention
from ..attention.link import HostFunction
from ..attention.session import current_router

_lock = threading.RLock()
_users = 0
_installed: list[tuple[CellType, HostFunction, HostFunction]] = []


def plain(func: HostFunction) -> HostFunction:
    """The host's own function behind `func`: behind a trampoline of ours, or `func` itself."""
    return getattr(func, INNER, func)


def wrapped_cells(module: ModuleType) -> dict[str, CellType]:
    """Name → the cell that holds the real function, for every attention function in the host's module."""
    cells: dict[str, CellType] = {}
    for wrapper in vars(module).values():
        if not isinstance(wrapper, FunctionType) or wrapper.__closure__ is None:
            continue
        if wrapper.__code__.co_freevars == ("func",) and wrapper.__code__.co_name == "wrapper":
            cell = wrapper.__closure__[0]
            cells[getattr(plain(cell.cell_contents), "__name__", "")] = cell
    return cells


def _trampoline(func: HostFunction) -> HostFunction:
    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return traced_attention(func, *args, bare=True, **kwargs)
        router = current_router(bare=True)
        return func(*args, **kwargs) if router is None else router.route(func, *args, **kwargs)

    setattr(call, INNER, func)
    return call


@contextmanager
def installed(module: ModuleType) -> Iterator[None]:
    """While inside, bare calls are routed in threads that are in a routed forward. Nests; leaves nothing behind."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for name, cell in wrapped_cells(module).items():
                func: Callable[..., torch.Tensor] = cell.cell_contents
                trampoline = _TRAMPOLINES.setdefault(name, _trampoline(func))
                if plain(trampoline) is not func:  # somebody replaced the function meanwhile
                    trampoline = _TRAMPOLINES[name] = _trampoline(func)
                compiled.host_functions[name] = func
                cell.cell_contents = trampoline
                _installed.append((cell, func, trampoline))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for cell, func, trampoline in _installed:
                    if cell.cell_contents is trampoline:  # else another pack put its own there since: leave it
                        cell.cell_contents = func
                _installed.clear()


# Kept between runs: a graph guards on the very object in the cell.
_TRAMPOLINES: dict[str, HostFunction] = {}
