"""First calls of kernels that compile themselves, made before a run instead of in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import torch

from .call import AttentionCall, Layout
from .kernel import Kernel, machine_reasons
from .machine import Machine
from .timings import Timings

log = logging.getLogger("attune")
_PERIOD = 2048  # 16 blocks of 128 tokens: beyond it lengths only repeat what Triton tells apart
Signature = tuple[str, ...]


def signature(kernel: Kernel, call: AttentionCall) -> Signature:
    """What a compiled kernel is compiled for: (kernel, device, dtype, dimensions, mask, heads, shortened lengths).

    Triton compiles anew for another data type, another constant (SageAttention's number of heads is one), and for
    integers that are 1, divisible by 16, or neither: lengths, strides, and numbers of blocks of 64 or 128 tokens.
    """
    mask = f"{call.mask.kind} {' '.join('1' if size == 1 else 'n' for size in call.mask.shape)}" if call.mask else ""
    return (
        kernel.name,
        call.device,
        str(call.dtype).removeprefix("torch."),
        str(call.head_dim),
        str(call.v_dim),
        mask,
        str(call.heads),
        str(call.kv_heads),
        str(_short(call.q_len)),
        str(_short(call.kv_len)),
    )


def _short(tokens: int) -> int:
    return tokens if tokens < _PERIOD else _PERIOD + tokens % _PERIOD


def _tensors(kernel: Kernel, wanted: Signature) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """q, k, v in the kernel's layout, and a mask, of a small call with that signature."""
    _, device, dtype_name, head_dim, v_dim, mask, *numbers = wanted
    dtype, (heads, kv_heads, q_len, kv_len) = getattr(torch, dtype_name), map(int, numbers)
    bhnd = kernel.layout is Layout.BHND

    def made(heads: int, length: int, dim: str) -> torch.Tensor:
        shape = (1, length, heads, int(dim))
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        return tensor.transpose(1, 2) if bhnd else tensor

    tensors = [made(heads, q_len, head_dim), made(kv_heads, kv_len, head_dim), made(kv_heads, kv_len, v_dim)]
    if not mask:
        return tensors, None
    kind, *dims = mask.split()
    sizes = [1 if dim == "1" else full for dim, full in zip(dims, (1, heads, q_len, kv_len), strict=True)]
    of = torch.bool if kind == "bool" else dtype
    return tensors, torch.ones(sizes, dtype=of, device=device)


def prepare(
    timings: Timings,
    kernels: Mapping[str, Kernel],
    may_run: Callable[[str, str], bool],
    say: Callable[[str], None],
    check: Callable[[], None],
) -> None:
    """Call the kernels that runs have wished for and that compile on first use, on small tensors.

    may_run: (kernel, device) may be called in this process. say: told what is done, in words for the user. check:
    called before each; what it raises ends it. A kernel that fails is left out and fails again where it is measured.
    """
    for wanted in list(timings.to_compile):
        name, device = wanted[:2]
        if wanted in timings.compiled or name not in kernels or not may_run(name, device):
            continue
        check()
        say(f"compiling {name}, once")
        try:
            tensors, mask = _tensors(kernels[name], wanted)
            kernels[name].load()(*tensors, mask=mask)
            if tensors[0].is_cuda:
                torch.cuda.synchronize(tensors[0].device)
        except Exception as error:
            say(f"{name} could not be prepared ({type(error).__name__}: {error})")
        timings.compiled.add(wanted)


def make_ready(
    timings: Timings,
    kernels: Mapping[str, Kernel],
    names: Iterable[str],
    machine: Machine,
    device: str,
    refused: Callable[[str], Mapping[str, str]],
    say: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Load, and where need be compile, the kernels `names` before a run on `device`: that is no part of the sampling.

    refused: device → the kernels that may not be called on it. say, check: as `prepare` has them.
    """
    chosen = {name: kernels[name] for name in names if name in kernels}

    def may_run(name: str, on: str) -> bool:
        return not machine_reasons(chosen[name], machine, machine.device(on)) and name not in refused(on)

    for name, kernel in chosen.items():
        if may_run(name, device):
            try:
                kernel.load()
            except Exception as error:  # it will fail again where it is planned, and be told then
                log.debug("%s could not be loaded: %s", name, error)
    prepare(timings, chosen, may_run, say, check)
