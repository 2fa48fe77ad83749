"""The calls that a kernel is proved with, made from what it claims, and how one of them is judged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from ..attention.builds import Build
from ..attention.call import AttentionCall, Layout, Mask
from ..attention.errors import InputKind, make_inputs, measure_errors
from ..attention.kernel import Kernel, Run, call_reasons
from ..attention.machine import Architecture, Device, Fetched, Machine
from ..attention.reference import reference_attention

HEADS = 8  # cuDNN gives wrong numbers below 8 key heads on some machines, and says so: ask for what it claims
_DIMS = (64, 128, 40, 96, 256)  # of the models that exist; the first one that a kernel claims is its main one
_TIMED = {True: (1, 4096), False: (1, 256)}  # batch and tokens on a GPU, and elsewhere


class Shape(NamedTuple):
    """The sizes of one call, where they differ from one trial to the next."""

    q_len: int = 257
    kv_len: int = 257
    batch: int = 1
    kv_heads: int = HEADS
    kind: InputKind = "structured"
    mask: str = ""  # "", "bool" (over keys) or "float" (over queries and keys)
    scale: float | None = None


_ELSE = (
    Shape(129, 77, 2),
    Shape(1, 33),
    Shape(65, 2305),  # beyond what kernels take for short
    Shape(65, 129, kind="bias_k"),
    Shape(65, 129, kind="bias_v"),
    Shape(65, 129, kind="spike_k"),
    Shape(65, 65, scale=0.2),
    Shape(65, 129, kv_heads=2),
    Shape(65, 77, 2, mask="bool"),
    Shape(65, 77, mask="float"),
)


@dataclass(frozen=True)
class Trial:
    """One call and the inputs it is made with."""

    call: AttentionCall
    kind: InputKind

    def __str__(self) -> str:
        call = self.call
        parts = [
            str(call.dtype).removeprefix("torch."),
            f"{call.q_len} queries on {call.kv_len} keys",
            f"head dimension {call.head_dim}",
        ]
        if call.mask is not None:
            parts.append(f"a {call.mask.kind} mask")
        if call.kv_heads != call.heads:
            parts.append(f"{call.heads} heads on {call.kv_heads}")
        if call.scale is not None:
            parts.append(f"scale {call.scale:g}")
        if self.kind != "structured":
            parts.append(f"inputs {self.kind}")
        return ", ".join(parts)


def _trial(shape: Shape, dim: int, dtype: torch.dtype, device: Device) -> Trial:
    mask = None
    if shape.mask == "bool":
        mask = Mask("bool", (shape.batch, 1, 1, shape.kv_len))
    elif shape.mask:
        mask = Mask("float", (1, 1, shape.q_len, shape.kv_len))
    call = AttentionCall(
        batch=shape.batch,
        heads=HEADS,
        kv_heads=shape.kv_heads,
        q_len=shape.q_len,
        kv_len=shape.kv_len,
        head_dim=dim,
        v_dim=dim,
        dtype=dtype,
        device=device.name,
        mask=mask,
        scale=shape.scale,
    )
    return Trial(call, shape.kind)


def trials(kernel: Kernel, machine: Machine, device: Device) -> list[Trial]:
    """The calls that `kernel` claims on `device`: each head dimension, then everything else at its main one.

    What it refuses by its own rules is left out.
    """
    wanted = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if dtype not in kernel.needs.dtypes:
            continue
        dims = [dim for dim in _DIMS if dim in kernel.needs.head_dims]
        wanted += [_trial(Shape(), dim, dtype, device) for dim in dims]
        wanted += [_trial(shape, dims[0], dtype, device) for shape in _ELSE if dims]
    return [trial for trial in wanted if not call_reasons(kernel, trial.call, machine)]


class Prepared(NamedTuple):
    trial: Trial
    inputs: tuple[torch.Tensor, ...]  # q, k, v in the kernel's layout
    mask: torch.Tensor | None
    wanted: torch.Tensor  # (B, H, N, D) in float32


def _mask(call: AttentionCall, tensors: str) -> torch.Tensor | None:
    if call.mask is None:
        return None
    numbers = torch.randn(call.mask.shape, generator=torch.Generator().manual_seed(1))
    if call.mask.kind == "bool":
        mask = numbers > -0.5
        mask[..., :1] = True  # no row is hidden as a whole
        return mask.to(tensors)
    return numbers.to(tensors, call.dtype)


def prepare(kernel: Kernel, trial: Trial, tensors: str) -> Prepared:
    """Inputs on the device `tensors`, and what the float32 reference makes of them.

    Done for all trials before the kernel is loaded: a package may replace parts of torch.
    """
    call = trial.call
    q, k, v = make_inputs(
        *(call.batch, call.heads, call.q_len, call.kv_len, call.head_dim),
        kind=trial.kind,
        kv_heads=call.kv_heads,
        dtype=call.dtype,
        device=tensors,
    )
    mask = _mask(call, tensors)
    wanted = reference_attention(q, k, v, mask=mask, scale=call.scale)
    # Memory in the order (B, N, H, D), as models have it.
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    if kernel.layout is Layout.BHND:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return Prepared(trial, (q, k, v), mask, wanted)


class Wrong(NamedTuple):
    """Wrong numbers: what was found in words, and the error where one could be measured."""

    detail: str
    error: float | None
    allowed: float


def judge(kernel: Kernel, run: Run, prepared: Prepared) -> float | Wrong:
    """Run one trial: the relative L2 error, or what is wrong with the result. Raises what the kernel raises."""
    trial, inputs, mask, wanted = prepared
    call, allowed = trial.call, kernel.tolerance[trial.call.dtype]
    before = [t.clone() for t in inputs]
    # What the kernel does not write must not look right by chance: leave NaN where its output will lie.
    torch.full_like(inputs[0], math.nan)
    out: Any = run(*inputs, mask=mask, scale=call.scale)
    if not isinstance(out, torch.Tensor):
        return Wrong(f"it returned a {type(out).__name__}, not a tensor, for {trial}", None, allowed)
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    if out.dtype is not call.dtype or out.shape != inputs[0].shape:
        found = f"{out.dtype} of shape {tuple(out.shape)}"
        return Wrong(
            f"it returned {found}, wanted {call.dtype} of {tuple(inputs[0].shape)}, for {trial}", None, allowed
        )
    if not all(torch.equal(old, new) for old, new in zip(before, inputs, strict=True)):
        return Wrong(f"it changed its inputs, for {trial}", None, allowed)
    out = out if kernel.layout is Layout.BHND else out.transpose(1, 2)
    error = measure_errors(out.float(), wanted).l2
    if math.isnan(error):
        return Wrong(f"NaN or infinity in the output for {trial}", None, allowed)
    if error > allowed:
        return Wrong(f"relative error {error:.2g} where {allowed:.2g} is allowed, for {trial}", error, allowed)
    return error


def timing(kernel: Kernel, run: Run, main: Trial, tensors: str) -> tuple[float, str]:
    """(milliseconds of the fastest of five calls, their shape in words), in the data type of `main`."""
    on_gpu = not tensors.startswith("cpu")
    batch, tokens = _TIMED[on_gpu]
    call = main.call
    shape = (batch, tokens, HEADS, call.head_dim)
    if kernel.layout is Layout.BHND:
        shape = (batch, HEADS, tokens, call.head_dim)
    q = torch.randn(shape, device=tensors, dtype=call.dtype)
    wait: Callable[[], Any] = torch.cuda.synchronize if tensors.startswith("cuda") else lambda: None
    best = math.inf
    for _ in range(6):
        k, v = q.clone(), q.clone()
        wait()
        started = time.perf_counter()
        run(q, k, v)
        wait()
        best = min(best, time.perf_counter() - started)
    words = f"{tokens} tokens, {HEADS} heads of {call.head_dim}, {str(call.dtype).removeprefix('torch.')}"
    return best * 1000, words


def machine_as_json(machine: Machine) -> dict[str, Any]:
    """A Machine for another process."""
    data = asdict(machine)
    for device in data["devices"]:
        device["architecture"] = device["architecture"].name
    return data


def machine_from_json(data: dict[str, Any]) -> Machine:
    """The reverse of machine_as_json."""
    devices = tuple(
        Device(
            **{
                **device,
                "architecture": Architecture[device["architecture"]],
                "capability": tuple(device["capability"]) if device["capability"] else None,
            }
        )
        for device in data["devices"]
    )
    fetched = {name: Fetched(**value) for name, value in data["fetched"].items()}
    builds = {
        name: Build(**{key: tuple(told) if isinstance(told, list) else told for key, told in build.items()})
        for name, build in data["builds"].items()
    }
    return Machine(**{**data, "devices": devices, "fetched": fetched, "builds": builds})
