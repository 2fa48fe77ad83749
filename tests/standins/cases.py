"""The calls that kernels are tested with, and how one is made, run and compared."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from comfyui_attune.attention.call import AttentionCall, Layout, Mask
from comfyui_attune.attention.errors import make_inputs, measure_errors
from comfyui_attune.attention.kernel import Kernel
from comfyui_attune.attention.machine import CPU, Architecture, Device, Machine, installed_packages, nvidia_architecture
from comfyui_attune.attention.reference import reference_attention
from comfyui_attune.kernels import KERNELS

BY_NAME = {kernel.name: kernel for kernel in KERNELS}
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (F16, BF16, F32)
# Kernel → the stand-ins it is tested with, and a GPU that the real package runs on.
STANDINS: dict[str, tuple[tuple[str, ...], tuple[int, int]]] = {
    "xformers": (("xformers",), (8, 9)),
    "xformers_cutlass": (("xformers",), (8, 9)),
    "flash2": (("flash2",), (8, 0)),
    "flash3": (("flash3", "flash3_old"), (9, 0)),
    "flash4": (("flash4",), (9, 0)),
    "sage1": (("sage1",), (8, 6)),
    "sage2_fp16_triton": (("sage2",), (8, 6)),
    "sage2_fp16_cuda": (("sage2",), (8, 0)),
    "sage2_fp8_cuda": (("sage2",), (8, 9)),
    "sage2_fp8_cuda_pp": (("sage2",), (8, 9)),
    "sage3": (("sage3", "sage3_old"), (12, 0)),
    "sage3_per_block_mean": (("sage3", "sage3_old"), (12, 0)),
    "kitchen_int8": (("kitchen",), (8, 9)),
}
ON_CPU = ("sdpa", "sdpa_flash", "sdpa_math", "split")
# What the lossy kernels' stand-ins may differ by: they compute exactly, so it is rounding alone.
ROUNDING = {F32: 2e-3, F16: 2e-3, BF16: 1.5e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes, and how its tensors lie in memory."""

    dtype: torch.dtype = F16
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    n: int = 33
    m: int = 33
    d: int = 64
    v_dim: int = 0
    mask: tuple[int, int, int, int] | None = None  # 1 where it broadcasts, anything else where not
    mask_dtype: torch.dtype = torch.bool
    scale: float | None = None
    memory: str = "host"  # host, contiguous, packed, columns, odd
    kind: Any = "structured"

    def __str__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                shown.append(f"{field.name}={str(value).removeprefix('torch.')}".replace(" ", ""))
        return ",".join(shown) or "plain"

    def call(self, device: str = "cuda:0") -> AttentionCall:
        mask = None
        if self.mask is not None:
            whole = (self.batch, self.heads, self.n, self.m)
            shape = tuple(1 if flag == 1 else size for flag, size in zip(self.mask, whole, strict=True))
            mask = Mask("bool" if self.mask_dtype is torch.bool else "float", shape)
        return AttentionCall(
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            q_len=self.n,
            kv_len=self.m,
            head_dim=self.d,
            v_dim=self.v_dim or self.d,
            dtype=self.dtype,
            device=device,
            mask=mask,
            scale=self.scale,
        )


_ = WHOLE = 2  # in a mask: this dimension does not broadcast
MASKS = [(1, 1, _, _), (1, 1, 1, _), (_, 1, 1, _), (_, 1, _, _), (1, _, _, _), (_, _, _, _), (_, _, _, 1)]
CASES = [
    *(Case(dtype=dtype) for dtype in DTYPES),
    *(Case(d=d) for d in (1, 8, 20, 40, 72, 80, 96, 128, 160, 192, 256, 264)),
    *(Case(d=d, dtype=F32) for d in (40, 96, 128)),
    *(Case(n=n, m=m) for n, m in ((1, 1), (1, 77), (129, 7), (64, 257))),
    *(Case(kv_heads=kv, dtype=dtype) for kv, dtype in itertools.product((1, 2), DTYPES)),
    Case(batch=1, heads=1, kv_heads=1),
    Case(batch=1, heads=1, kv_heads=1, n=1, mask=(1, 1, 1, _)),
    *(Case(mask=mask, mask_dtype=dtype) for mask, dtype in itertools.product(MASKS, (torch.bool, F16, F32))),
    *(Case(mask=(1, 1, _, _), mask_dtype=mask, dtype=dtype, m=40) for mask, dtype in ((F16, BF16), (F32, F32))),
    *(Case(mask=mask, kv_heads=2, n=9, m=21, dtype=dtype) for mask, dtype in itertools.product(MASKS, (BF16, F32))),
    *(Case(scale=scale) for scale in (0.0, 0.3, 64**-0.5, -0.1, -2.0)),
    Case(scale=-2.0, mask=(1, 1, _, _), kv_heads=2),
    *(Case(memory=memory, dtype=dtype) for memory in ("contiguous", "packed", "columns", "odd") for dtype in DTYPES),
    Case(memory="odd", kv_heads=2, mask=(1, _, _, _), mask_dtype=F16, n=7, m=13),
    *(Case(kind=kind) for kind in ("normal", "bias_k", "bias_v", "spike_k")),
    *(Case(v_dim=v_dim) for v_dim in (32, 20)),
]


def tensors(case: Case, layout: Layout, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """q, k, v in `layout`, lying in memory as the case says, and the mask (four-dimensional) or None."""
    q, k, v = make_inputs(
        case.batch, case.heads, case.n, case.m, case.d, kind=case.kind, kv_heads=case.kv_heads, device=device
    )
    if case.v_dim:
        v = v[..., : case.v_dim] if case.v_dim <= case.d else v.repeat(1, 1, 1, 2)[..., : case.v_dim]
    views = []
    for tensor in (q, k, v):
        tensor = tensor.to(case.dtype)
        if layout is Layout.BNHD:
            tensor = tensor.transpose(1, 2)
        match case.memory:
            case "host":  # as from (B, N, H·D), whatever the layout
                axes = (0, 2, 1, 3) if layout is Layout.BHND else (0, 1, 2, 3)
                views.append(tensor.permute(axes).contiguous().permute(axes))
            case "contiguous":
                views.append(tensor.contiguous())
            case "packed":  # one third of a tensor that holds q, k and v side by side
                views.append(torch.cat([tensor] * 3, dim=3)[..., case.d : case.d + tensor.shape[3]])
            case "columns":  # the last dimension is not contiguous
                views.append(tensor.transpose(2, 3).contiguous().transpose(2, 3))
            case _:  # rows at odd addresses
                wide = torch.nn.functional.pad(tensor, (3, 0))
                views.append(wide[..., 3:])
    mask = None
    if case.mask is not None:
        shape = case.call().mask.shape
        generator = torch.Generator().manual_seed(1)
        numbers = torch.randn(shape, generator=generator).to(device)
        if case.mask_dtype is torch.bool:
            mask = numbers > -0.5
            mask[..., :1] = True  # no row is hidden as a whole
        else:
            mask = torch.where(numbers < -1.0, float("-inf"), numbers).to(case.mask_dtype)
            mask[..., :1] = 0.5
    return (*views, mask)


def check(kernel: Kernel, case: Case, tolerance: float, device: str = "cpu") -> None:
    """Run the case and compare; inputs must stay as they are."""
    q, k, v, mask = tensors(case, kernel.layout, device)
    before = [None if t is None else t.clone() for t in (q, k, v, mask)]
    out = kernel.load()(q, k, v, mask=mask, scale=case.scale)
    for name, old, new in zip("qkvm", before, (q, k, v, mask), strict=True):
        assert old is None or torch.equal(old, new), f"{name} was modified"
    assert isinstance(out, torch.Tensor)
    assert out.dtype is case.dtype
    assert out.device == q.device
    swap = kernel.layout is Layout.BNHD
    assert out.shape == (*q.shape[:3], v.shape[3])
    q, k, v, out = (t.transpose(1, 2) if swap else t for t in (q, k, v, out))
    wanted = reference_attention(q, k, v, mask=mask, scale=case.scale)
    error = measure_errors(out.float(), wanted).l2
    assert error <= tolerance, f"relative L2 error {error:.2g}, allowed {tolerance:.2g}"


def pretended(capability: tuple[int, int] | None, title: str = "a pretended GPU", **changes: Any) -> Machine:
    """A machine with one GPU and whatever packages can be found."""
    architecture = Architecture.AMD if capability is None else nvidia_architecture(capability)
    gpu = Device("cuda:0", title, architecture, capability, 24 << 30)
    found = {"torch": "2.11.0+cu130", "cuda": "13.0", "triton": "3.6.0", "packages": installed_packages(), **changes}
    return Machine(devices=(gpu, CPU), **found)


Each = Callable[[Case], AbstractContextManager[None]]


@contextmanager
def collected() -> Iterator[Each]:
    """`with collected() as each:`, then `with each(case):` goes on after a failure; all of them are told at the end."""
    failed = []

    @contextmanager
    def one(case: Case) -> Iterator[None]:
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:  # an AssertionError, or whatever a kernel raises
            failed.append(f"{case}: {type(error).__name__}: {error}")

    yield one
    assert not failed, f"{len(failed)} cases failed:\n" + "\n".join(failed)
