"""What a router needs of its host, as values, and how torch says that memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .timings import Timings

HostFunction = Callable[..., torch.Tensor]


def is_out_of_memory(error: BaseException) -> bool:
    """Is this a failed allocation, as torch reports it on CUDA, on the CPU and in older versions?"""
    out_of_memory = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError  # by that name from 2.5 on
    if isinstance(error, (out_of_memory, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


@dataclass(frozen=True)
class HostLink:
    """What a router needs of its host, as values.

    `plain(func)` is the host's own function behind `func`, without anything of this pack around it. `interrupts` are
    exceptions that mean "stop". `free_memory()` empties caches; `free_bytes(device)` is what a kernel may still
    allocate on it, None where nobody knows. `refused(device)` gives the kernels that may not be called there now, each
    with the reason: they have not been proved, or were found wanting. `timings` is what was measured for `auto` so
    far, None where nothing is to be measured; `spare_bytes(device)` is what may be allocated there without raising the
    peak of what this process has had, None where nobody knows.
    """

    plain: Callable[[HostFunction], HostFunction] = lambda func: func
    interrupts: tuple[type[BaseException], ...] = ()
    free_memory: Callable[[], None] = lambda: None
    free_bytes: Callable[[str], int | None] = lambda device: None
    refused: Callable[[str], Mapping[str, str]] = lambda device: {}
    timings: Timings | None = None
    spare_bytes: Callable[[str], int | None] = lambda device: None
