"""SageAttention 1 and 2: 8-bit queries and keys, values in 16 or 8 bits. Every function swallows masks silently.

Limits: sageattention 1.0.6 on the package index (sageattention/core.py); github.com/thu-ml/SageAttention at bbe24d4,
which is 2.2.0. Later commits call themselves 2.2.0 as well and give the Triton function a mask: as nobody can tell
them apart by version, no mask is ever handed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..attention.call import AttentionCall, Layout
from ..attention.kernel import Capability, Kernel, Needs, Run
from ..attention.machine import Device, Machine
from ._common import (
    FULL,
    HALF,
    capability,
    chosen,
    counts,
    needs_cuda,
    needs_version,
    on_device,
    rows,
    source,
    upright,
    upright_bytes,
)

_URL = "https://github.com/thu-ml/SageAttention"
_INSTALL_2 = "build SageAttention 2 from github.com/thu-ml/SageAttention"
_HOPPER = (9, 0)


def _function(kernel: str, name: str) -> Callable[..., Tensor]:
    """A function of what `kernel` is loaded from; ImportError names it where it is missing."""
    module = source(kernel, "sageattention", "sageattention", () if kernel == "sage1" else (_IS_2,))
    # The Hub's build exports few functions and has the others in its module `core`.
    found: Callable[..., Tensor] | None = getattr(module, name, None)
    found = found or getattr(getattr(module, "core", None), name, None)
    if found is None:
        raise ImportError(f"the sageattention in {module.__file__} has no {name}")
    return found


def _no_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError("SageAttention would ignore the mask")


def _load_1() -> Run:
    attend = _function("sage1", "sageattn")

    def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        _no_mask(mask)
        # It subtracts the mean from k in place.
        k = k.clone(memory_format=torch.contiguous_format)
        return attend(rows(q), k, rows(v), tensor_layout="NHD", sm_scale=scale)

    return on_device(run)


def _loader_2(kernel: str, name: str, **options: Any) -> Callable[[], Any]:
    """`sageattn_qk_int8_pv_<name>`; on Hopper the function written for it takes the place of fp8_cuda.

    It returns a RunLse with `return_lse` among the options, a Run without.
    """

    def load() -> Any:
        function = _function(kernel, f"sageattn_qk_int8_pv_{name}")
        on_hopper = functools.cache(lambda: _function(kernel, "sageattn_qk_int8_pv_fp8_cuda_sm90"))

        def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Any:
            _no_mask(mask)
            q, scale = upright(q, scale)
            attend, extra = function, options
            gpu = capability(q)
            if name == "fp8_cuda" and gpu == _HOPPER:
                attend = on_hopper()
            elif name == "fp8_cuda" and gpu is not None and gpu[0] == 12:
                # As its own dispatch does there.
                extra = {**options, "qk_quant_gran": "per_warp"}
            return attend(rows(q), rows(k), rows(v), tensor_layout="NHD", sm_scale=scale, **extra)

        return on_device(cast(Run, run))

    return load


def _padded(dim: int) -> int:
    return 64 if dim <= 64 else 128


def _workspace(call: AttentionCall) -> int:
    q, k, v, out = (count // call.head_dim * _padded(call.head_dim) for count in counts(call))
    size = call.dtype.itemsize
    # q and k in 8 bits, v in 16 at most (transposed and padded on the way to 8), copies where heads are padded.
    padded = (q + k + v + out) * size if call.head_dim != _padded(call.head_dim) else 0
    return q + k + 2 * v + v + padded + upright_bytes(call)


def _workspace_1(call: AttentionCall) -> int:
    q, k, v, _ = counts(call)
    return q + k + (2 * v if call.dtype is not torch.float16 else 0) + k * call.dtype.itemsize


def _old_on_blackwell(device: Device, machine: Machine) -> str | None:
    """2.0.0 knows no architecture newer than Hopper."""
    if device.capability is None or device.capability <= _HOPPER:
        return None
    reason = _FROM_2_1(device, machine)
    return f"{reason} (for {device.sm})" if reason else None


_FROM_2_1 = needs_version("sageattention", at_least="2.1")
_IS_1 = needs_version("sageattention", below="2", why="SageAttention 2 replaced the function")
_IS_2 = needs_version("sageattention", at_least="2", why="SageAttention 1 has none of these functions")


def _kernel_2(
    name: str,
    title: str,
    function: str,
    options: dict[str, str],
    sm: tuple[tuple[Capability, Capability], ...],
    error: float,
    *rules: Callable[[Device, Machine], str | None],
) -> Kernel:
    return Kernel(
        name=name,
        title=title,
        package="sageattention",
        layout=Layout.BNHD,
        precision="lossy",
        tolerance=dict.fromkeys(HALF, error),
        load=_loader_2(name, function, **options),
        load_lse=_loader_2(name, function, return_lse=True, **options),
        needs=Needs(
            sm=sm,
            head_dims=range(1, 129),
            gqa=True,
            triton=True,
            package_rules=(_IS_2,),
            machine_rules=chosen(_old_on_blackwell, *rules),
        ),
        install=_INSTALL_2,
        url=_URL,
        workspace_bytes=_workspace,
    )


# What each function's own dispatch and build file know. 10.x builds, and raises when called.
_TRITON = (((8, 0), (9, 0)),)  # "triton kernel is currently not usable on sm120"
_FP16 = (((8, 0), (9, 0)), ((12, 0), (12, 1)))
_FP8 = (((8, 9), (9, 0)), ((12, 0), (12, 1)))
_PP = (((8, 9), (8, 9)), ((12, 0), (12, 1)))

# Tolerances: simulated errors of these recipes on inputs with biases and spikes, doubled. Not measured on a GPU.
KERNELS = (
    Kernel(
        name="sage1",
        title="SageAttention 1 (Triton)",
        package="sageattention",
        layout=Layout.BNHD,
        precision="lossy",
        tolerance=dict.fromkeys(FULL, 0.04),
        load=_load_1,
        needs=Needs(
            sm=(((8, 0), (999, 9)),),
            dtypes=FULL,
            head_dims=frozenset({64, 96, 128}),
            gqa=True,
            triton=True,
            machine_rules=chosen(_IS_1),
        ),
        install="pip install sageattention==1.0.6",
        url=_URL,
        workspace_bytes=_workspace_1,
    ),
    _kernel_2(
        "sage2_fp16_triton",
        "SageAttention 2 (16-bit PV, Triton)",
        "fp16_triton",
        {},
        _TRITON,
        0.04,
    ),
    _kernel_2(
        "sage2_fp16_cuda",
        "SageAttention 2 (16-bit PV, CUDA)",
        "fp16_cuda",
        {"pv_accum_dtype": "fp32"},
        _FP16,
        0.04,
    ),
    _kernel_2(
        "sage2_fp8_cuda",
        "SageAttention 2 (8-bit PV, CUDA)",
        "fp8_cuda",
        {"pv_accum_dtype": "fp32+fp32"},
        _FP8,
        0.07,
    ),
    _kernel_2(
        "sage2_fp8_cuda_pp",
        "SageAttention 2++ (8-bit PV, 16-bit accumulator)",
        "fp8_cuda",
        {"pv_accum_dtype": "fp32+fp16"},
        _PP,
        0.1,
        # Before 2.2.0 the accumulator is unknown, and an unknown one returns uninitialised memory without an error.
        needs_version("sageattention", at_least="2.2.0", why="older ones return garbage for this accumulator"),
        needs_cuda("12.8"),
    ),
)
