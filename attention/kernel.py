"""What a kernel is: metadata that says what it needs, and a `load` that imports it only when it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch

from .call import AttentionCall, Layout, MaskKind
from .machine import Device, Machine

Precision = Literal["exact", "lossy"]
Capability = tuple[int, int]
ANY_SM: tuple[Capability, Capability] = ((0, 0), (999, 9))


class Run(Protocol):
    """A loaded kernel: tensors in the kernel's layout in, one tensor in the same layout and dtype out.

    k and v may have fewer heads than q (grouped-query attention) where `Needs.gqa` is set. `mask` is four-dimensional
    and broadcastable, `scale` None means 1/sqrt(D). q, k, v and mask are never written to.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor: ...


class RunLse(Protocol):
    """As Run, but gives (output, log-sum-exp): what ring attention joins the parts of a call by.

    The log-sum-exp is that of the scaled and masked scores of each row, (B, H, N) whatever the layout, float32.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


ExtraRule = Callable[[AttentionCall, Machine], str | None]
MachineRule = Callable[[Device, Machine], str | None]


@dataclass(frozen=True, slots=True)
class Needs:
    """A kernel's limits, as data. What is not declared is refused: masks, grouped-query attention, other v dims.

    `sm` holds closed ranges of compute capability and is asked only of CUDA devices. `head_dims` is a set of
    dimensions, or a range with step (`range(8, 257, 8)`). `machine_rules` are asked without a call, `call_rules` with
    one; each gives a reason or None. `package_rules` are asked like `machine_rules` and say that what is installed
    under the package's name is something else, so that a fetched kernel may take its place.
    """

    devices: frozenset[str] = frozenset({"cuda"})
    sm: tuple[tuple[Capability, Capability], ...] = (ANY_SM,)
    dtypes: frozenset[torch.dtype] = frozenset({torch.float16, torch.bfloat16})
    head_dims: frozenset[int] | range = range(1, 257)
    masks: frozenset[MaskKind] = frozenset()
    gqa: bool = False
    scale: bool = True
    other_v_dim: bool = False
    fp32_scores: bool = True
    max_batch: int = 2**31
    max_batch_heads: int = 2**31
    triton: bool = False
    package_rules: tuple[MachineRule, ...] = ()
    machine_rules: tuple[MachineRule, ...] = ()
    call_rules: tuple[ExtraRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a kernel with several configurations finds the fastest one on a GPU, and is told of it.

    refine(device, say): case → configuration, in the kernel's own words. It runs the kernel on `device`, so it is
    called in a child process only; `say` is told of each step. use(device, choice): have later calls on `device` take
    them; what is not known any more is passed over.
    """

    refine: Callable[[str, Callable[[str], None]], dict[str, str]]
    use: Callable[[str, Mapping[str, str]], None]


def no_workspace(_call: AttentionCall) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute attention.

    `package` is the import name of what it comes from ("torch" for PyTorch, "" for our own code). `tolerance` is the
    relative L2 error it may have against float32 on structured inputs, per dtype. `workspace_bytes(call)` is what it
    allocates beyond inputs and output. `install` says in words how to get it. `needs_proof` False: plain PyTorch, which
    the host itself runs in its process; any other kernel is first tried in a child process.
    `origin`: a digest of the code of a kernel that comes from no package, and its file where that is not in the pack; a
    verdict is of that content.
    `load_lse`: the same kernel with its log-sum-exp, None where it gives none.
    """

    name: str
    title: str
    package: str
    layout: Layout
    precision: Precision
    tolerance: dict[torch.dtype, float]
    load: Callable[[], Run]
    needs: Needs
    install: str = ""
    url: str = ""
    needs_proof: bool = True
    origin: str = ""
    tuning: Tuning | None = None
    workspace_bytes: Callable[[AttentionCall], int] = field(default=no_workspace)
    load_lse: Callable[[], RunLse] | None = None

    @property
    def exact(self) -> bool:
        return self.precision == "exact"


def _sm_text(ranges: tuple[tuple[Capability, Capability], ...]) -> str:
    def one(low: Capability, high: Capability) -> str:
        low_text, high_text = f"sm_{low[0]}{low[1]}", f"sm_{high[0]}{high[1]}"
        if low == high:
            return low_text
        return f"{low_text} or newer" if high == ANY_SM[1] else f"{low_text} to {high_text}"

    return ", ".join(one(low, high) for low, high in ranges)


def machine_reasons(kernel: Kernel, machine: Machine, device: Device | None = None) -> tuple[str, ...]:
    """Every reason why `kernel` cannot run on `device` (the machine's main one) whatever the call; empty if none."""
    device = device or machine.main_device
    needs = kernel.needs
    reasons = []
    not_this = [reason for rule in needs.package_rules if (reason := rule(device, machine))]
    missing = kernel.package not in ("", "torch") and kernel.package not in machine.packages
    if (missing or not_this) and (fetched := machine.fetched.get(kernel.name)) is not None:
        _folder, refused = fetched
        if refused:
            reasons.append(refused)
        # The rules below are about the fetched kernel, of which no package's version tells anything.
        others = {name: version for name, version in machine.packages.items() if name != kernel.package}
        machine, not_this = replace(machine, packages=others), []
    elif missing:
        reasons.append(
            f"package {kernel.package} is not installed" + (f" ({kernel.install})" if kernel.install else "")
        )
    if device.type not in needs.devices:
        wanted = " or ".join(sorted(needs.devices))
        reasons.append(f"needs a {wanted} device, this is {device.type}")
    elif device.capability and not any(low <= device.capability <= high for low, high in needs.sm):
        reasons.append(f"needs {_sm_text(needs.sm)}, this GPU is {device.sm} ({device.architecture.value})")
    if needs.triton and machine.triton is None:
        reasons.append("needs Triton, which is not installed")
    reasons += not_this
    reasons += [reason for rule in needs.machine_rules if (reason := rule(device, machine))]
    return tuple(reasons)


def _dims_text(dims: frozenset[int] | range) -> str:
    if isinstance(dims, range):
        step = f", in steps of {dims.step}" if dims.step > 1 else ""
        return f"{dims[0]} to {dims[-1]}{step}"
    return ", ".join(map(str, sorted(dims)))


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def call_reasons(kernel: Kernel, call: AttentionCall, machine: Machine) -> tuple[str, ...]:
    """Every reason why `kernel` cannot compute `call`, the machine apart."""
    needs = kernel.needs
    reasons = []
    if call.unknown:
        reasons.append(f"the call has arguments this pack does not know: {', '.join(call.unknown)}")
    if call.gradient:
        reasons.append("has no backward pass here, and the call asks for gradients")
    if call.dtype not in needs.dtypes:
        wanted = ", ".join(sorted(map(_dtype_text, needs.dtypes)))
        mixed = " (q, k and v differ and are computed in it)" if call.mixed_dtypes else ""
        reasons.append(f"needs {wanted}, the tensors are {_dtype_text(call.dtype)}{mixed}")
    if call.head_dim not in needs.head_dims:
        reasons.append(f"needs a head dimension of {_dims_text(needs.head_dims)}, this is {call.head_dim}")
    if call.v_dim != call.head_dim and not needs.other_v_dim:
        reasons.append(f"needs values as wide as keys ({call.head_dim}), they are {call.v_dim}")
    if call.mask is not None and call.mask.kind not in needs.masks:
        taken = f"takes only {' or '.join(sorted(needs.masks))} masks" if needs.masks else "takes no mask"
        reasons.append(f"{taken}, the call has a {call.mask.kind} mask")
    if call.kv_heads != call.heads and not needs.gqa:
        reasons.append(f"has no grouped-query attention, the call has {call.heads} heads on {call.kv_heads}")
    if call.scale is not None and not needs.scale:
        reasons.append(f"ignores the scale, the call asks for {call.scale:g}")
    if call.fp32_scores and not needs.fp32_scores:
        reasons.append("computes scores in the tensors' own precision, the model asks for float32")
    if not kernel.exact and not call.lossy_allowed:
        reasons.append("is lossy, the model forbids low precision for this call")
    if call.batch > needs.max_batch:
        reasons.append(f"takes a batch of at most {needs.max_batch}, this is {call.batch}")
    if call.batch * call.heads > needs.max_batch_heads:
        reasons.append(f"takes at most {needs.max_batch_heads} batch·heads, this is {call.batch * call.heads}")
    reasons += [reason for rule in needs.call_rules if (reason := rule(call, machine))]
    return tuple(reasons)


def reasons_against(kernel: Kernel, call: AttentionCall, machine: Machine) -> tuple[str, ...]:
    """All reasons against running `call` with `kernel` on this machine, with what was wanted and what was found."""
    return machine_reasons(kernel, machine, machine.device(call.device)) + call_reasons(kernel, call, machine)
