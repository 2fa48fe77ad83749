"""The kernels: one file per family, each exporting `KERNELS`. To add a kernel, add a file."""

from __future__ import annotations

import importlib
import pkgutil

from ..attention.kernel import Kernel

KERNELS: tuple[Kernel, ...] = tuple(
    kernel
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name)
    for kernel in getattr(importlib.import_module(f"{__name__}.{module.name}"), "KERNELS", ())
)
