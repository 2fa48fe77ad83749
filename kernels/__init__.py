"""The kernels: one file per family, each exporting `KERNELS`. To add a kernel, add a file."""

from __future__ import annotations

import importlib
import pkgutil

from ..attention.kernel import Kernel
from ..attention.policy import KERNEL_NAMES


def _place(kernel: Kernel) -> tuple[int, str]:
    """The order of node option lists, and of `attune kernels`; a name that is missing there comes last."""
    return (KERNEL_NAMES.index(kernel.name) if kernel.name in KERNEL_NAMES else len(KERNEL_NAMES)), kernel.name


KERNELS: tuple[Kernel, ...] = tuple(
    sorted(
        (
            kernel
            for module in pkgutil.iter_modules(__path__)
            for kernel in getattr(importlib.import_module(f"{__name__}.{module.name}"), "KERNELS", ())
        ),
        key=_place,
    )
)
