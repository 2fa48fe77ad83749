"""The kernels: one file per family, each exporting `KERNELS`. To add a kernel, add a file."""

from __future__ import annotations

import importlib
import pkgutil

from ..attention.kernel import Kernel

# The order of node option lists and of `attune kernels`. A name that is missing here comes after these.
_ORDER = (
    "sdpa",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "sdpa_math",
    "xformers",
    "xformers_cutlass",
    "flash2",
    "flash3",
    "flash4",
    "sage1",
    "sage2_fp16_triton",
    "sage2_fp16_cuda",
    "sage2_fp8_cuda",
    "sage2_fp8_cuda_pp",
    "sage3",
    "sage3_per_block_mean",
    "kitchen_int8",
    "attune_int8",
    "split",
)


def _place(kernel: Kernel) -> tuple[int, str]:
    return (_ORDER.index(kernel.name) if kernel.name in _ORDER else len(_ORDER)), kernel.name


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
