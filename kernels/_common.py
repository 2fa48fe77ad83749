"""What the kernel files share: versions, rules about the machine, views and memory sizes."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..attention.call import AttentionCall, MaskKind
from ..attention.hub_package import hub_package
from ..attention.kernel import MachineRule, Run, RunLse
from ..attention.machine import CPU, Device, Machine, fetched_kernel, installed_packages

HALF = frozenset({torch.float16, torch.bfloat16})
FULL = HALF | {torch.float32}
ANY_MASK: frozenset[MaskKind] = frozenset({"bool", "float"})

# Relative L2 error of exact kernels: rounding of the weights and of the output, with room for the order of sums.
EXACT = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

_Run = TypeVar("_Run", Run, RunLse)
Version = tuple[tuple[int, ...], int, int]
_STAGES = {"dev": -4, "a": -3, "b": -2, "rc": -1, "": 0, "post": 1}
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)[._-]?(dev|a|b|rc|post)?\.?(\d*)")


def parse_version(text: str) -> Version | None:
    """A version that compares like PEP 440 for what attention packages use; None where `text` is no version.

    Local parts ("+cu128torch2.9") are left out, trailing zeros do not count.
    """
    found = _VERSION.match(text.strip().lower())
    if found is None:
        return None
    release = tuple(int(part) for part in found[1].split("."))
    while release and release[-1] == 0:
        release = release[:-1]
    return release, _STAGES[found[2] or ""], int(found[3] or 0)


def version_of(machine: Machine, package: str) -> Version | None:
    """The installed version of `package` (import name); None where it is not installed or does not say."""
    return parse_version(machine.packages.get(package, ""))


def needs_version(package: str, *, at_least: str = "", below: str = "", why: str = "") -> MachineRule:
    """Refuse versions outside [at_least, below). A package that does not tell its version is let through."""
    low, high = parse_version(at_least), parse_version(below)

    def rule(_device: Device, machine: Machine) -> str | None:
        found = version_of(machine, package)
        if found is None or ((low is None or found >= low) and (high is None or found < high)):
            return None
        wanted = " and ".join(
            part for part in (f"{at_least} or newer" if at_least else "", f"below {below}" if below else "") if part
        )
        return f"needs {package} {wanted}, installed is {machine.packages[package]}" + (f": {why}" if why else "")

    return rule


def source(name: str, package: str, module: str, package_rules: tuple[MachineRule, ...] = ()) -> ModuleType:
    """What the kernel `name` is loaded from: `module` of the installed package, else what the user fetched.

    The choice is that of machine_reasons(): a package that is installed and broken is not replaced.
    """
    fetched = fetched_kernel(name)
    if fetched is not None:
        machine = Machine(packages=installed_packages())
        if package not in machine.packages or any(rule(CPU, machine) for rule in package_rules):
            if fetched.refused:
                raise ImportError(fetched.refused)
            return _from_folder(fetched.folder)
    return importlib.import_module(module)


@functools.lru_cache(maxsize=16)
def _from_folder(folder: str) -> ModuleType:
    """A kernel in the layout of the Hugging Face Hub. Nothing is asked of the network."""
    module: ModuleType = hub_package().get_local_kernel(Path(folder))
    return module


def needs_nvidia(device: Device, _machine: Machine) -> str | None:
    """Refuse AMD GPUs, which torch calls "cuda" as well, and which have no compute capability."""
    if device.type == "cuda" and device.capability is None:
        return f"needs an NVIDIA GPU, this is {device.title} ({device.architecture.value})"
    return None


def needs_cuda(at_least: str) -> MachineRule:
    """Refuse a torch built for an older CUDA than `at_least`."""

    def rule(device: Device, machine: Machine) -> str | None:
        found = parse_version(machine.cuda or "")
        wanted = parse_version(at_least)
        if device.type != "cuda" or found is None or wanted is None or found >= wanted:
            return None
        return f"needs CUDA {at_least} or newer, torch was built for CUDA {machine.cuda}"

    return rule


def v_dim_by_8(call: AttentionCall, _machine: Machine) -> str | None:
    """Refuse values whose width does not divide by 8, in kernels that take another one than keys have."""
    return f"needs values of a width divisible by 8, this is {call.v_dim}" if call.v_dim % 8 else None


@functools.lru_cache(maxsize=64)
def capability_of(index: int | None) -> tuple[int, int] | None:
    """Compute capability of the GPU of this number; None for a CPU (None, -1) and on AMD."""
    if index is None or index < 0 or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(index)


def capability(tensor: Tensor) -> tuple[int, int] | None:
    """Compute capability of the GPU that holds `tensor`; None elsewhere and on AMD."""
    return capability_of(tensor.get_device()) if tensor.is_cuda else None


def upright(q: Tensor, scale: float | None) -> tuple[Tensor, float | None]:
    """The same product with a scale that is not negative.

    FlashAttention and what comes from it take the row maximum before scaling: with a negative scale that is the
    minimum, and the exponentials overflow (flash-attn 2.8.3, csrc/flash_attn/src/softmax.h).
    """
    return (q, scale) if scale is None or scale >= 0 else (-q, -scale)


def rows(tensor: Tensor) -> Tensor:
    """`tensor`, copied only where its rows cannot be read in blocks of 8 numbers (16 bytes in half precision)."""
    strides = tensor.stride()
    odd = tensor.storage_offset()
    for stride in strides[:-1]:
        odd |= stride
    return tensor if strides[-1] == 1 and not odd & 7 else tensor.contiguous()


def on_device(run: _Run) -> _Run:
    """Run with the tensors' GPU as the current one, and put back what a package makes current instead.

    Triton and CuTe launch on the current GPU, and SageAttention 2 changes it.
    """

    @functools.wraps(run)
    def guarded(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Any:
        if not q.is_cuda:
            return run(q, k, v, mask=mask, scale=scale)
        with torch.cuda.device(q.device):
            return run(q, k, v, mask=mask, scale=scale)

    return cast(_Run, guarded)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add, in `dtype`. Finite numbers stay finite: a row of them must not turn into -inf."""
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    if mask.dtype is dtype:
        return mask
    limit = torch.finfo(dtype).max
    if torch.finfo(mask.dtype).max > limit:
        mask = torch.where(mask.isinf(), mask, mask.clamp(-limit, limit))
    return mask.to(dtype)


def counts(call: AttentionCall) -> tuple[int, int, int, int]:
    """How many numbers q, k, v and the output hold."""
    queries, keys = call.batch * call.heads * call.q_len, call.batch * call.kv_heads * call.kv_len
    return queries * call.head_dim, keys * call.head_dim, keys * call.v_dim, queries * call.v_dim


def mask_count(call: AttentionCall) -> int:
    """How many numbers the mask holds as it is stored; 0 without one."""
    if call.mask is None:
        return 0
    first, second, third, fourth = call.mask.shape
    return first * second * third * fourth


def upright_bytes(call: AttentionCall) -> int:
    """What `upright` allocates."""
    return counts(call)[0] * call.dtype.itemsize if call.scale is not None and call.scale < 0 else 0


def lse_bytes(call: AttentionCall) -> int:
    """A log-sum-exp per query in float32."""
    return 4 * call.batch * call.heads * call.q_len


def padded_bytes(call: AttentionCall, dim: int) -> int:
    """Copies of q, k, v and the output with heads padded to `dim`; 0 where they have that already."""
    if call.head_dim == dim:
        return 0
    return sum(counts(call)) // call.head_dim * dim * call.dtype.itemsize


def chosen(*rules: Callable[[Device, Machine], str | None]) -> tuple[MachineRule, ...]:
    """Rules for kernels that only exist on NVIDIA GPUs."""
    return (needs_nvidia, *rules)
