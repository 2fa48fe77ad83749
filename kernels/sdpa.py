"""PyTorch's own attention: its choice, and each of its back ends by itself.

Limits of the back ends: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and sdp_utils_cpp.cpp of PyTorch 2.11.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention.call import AttentionCall, Layout
from ..attention.kernel import Kernel, Needs, Run, RunLse
from ..attention.machine import Device, Machine
from ._common import (
    ANY_MASK,
    EXACT,
    FULL,
    HALF,
    as_bias,
    capability,
    needs_nvidia,
    parse_version,
    upright,
    v_dim_by_8,
)
from ._sdpa_lse import any_lse, cudnn_lse, efficient_lse, flash_lse
from ._sdpa_memory import any_bytes, fused, fused_bytes, math_bytes

# The grid of the CUDA kernels has the batch in a dimension of 16 bits; the host splits at the same number.
_MOST_BATCHES = 2**15
# `sdpa_kernel` sets flags of the whole process: no other thread may look at them while one call is on its way.
_FLAGS = threading.RLock()
_URL = "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html"


def _is_cuda(call: AttentionCall) -> bool:
    return call.device.partition(":")[0] == "cuda"


def _prepared_mask(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    if (
        mask.dtype is not torch.bool
        and mask.dtype is not q.dtype
        and not (
            # The CPU takes float32 with anything, and loses nothing by it.
            q.device.type == "cpu" and mask.dtype is torch.float32
        )
    ):
        mask = as_bias(mask, q.dtype)
    if q.is_cuda:
        if mask.shape[3] != k.shape[2]:
            mask = mask.expand(-1, -1, -1, k.shape[2])
        if mask.stride(3) != 1:
            mask = mask.contiguous()
    return mask


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, repeat: bool) -> Tensor:
    q, scale = upright(q, scale)
    if mask is not None:
        mask = _prepared_mask(q, k, mask)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    options = {}
    if k.shape[1] != q.shape[1]:
        flash = (capability(q) or (8, 0)) >= (8, 0)
        if repeat and q.is_cuda and not fused(q.dtype, q.shape[3], v.shape[3], mask is not None, True, flash):
            # Grouped queries with a mask have no fused back end. Repeated keys are far smaller than scores.
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        else:
            options = {"enable_gqa": True}
    attend = torch.nn.functional.scaled_dot_product_attention
    if q.shape[0] <= _MOST_BATCHES or not q.is_cuda or torch.version.hip is not None:
        return attend(q, k, v, attn_mask=mask, scale=scale, **options)
    return in_batches(
        lambda a, b, c, bias: attend(a, b, c, attn_mask=bias, scale=scale, **options), q, k, v, mask, _MOST_BATCHES
    )


def in_batches(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    most: int,
) -> Tensor:
    """`attend(q, k, v, mask)` in slices of at most `most` batches; a mask may broadcast over the batch."""
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    for start in range(0, q.shape[0], most):
        part = slice(start, start + most)
        bias = mask if mask is None or mask.shape[0] == 1 else mask[part]
        out[part] = attend(q[part], k[part], v[part], bias)
    return out


@contextmanager
def _full_sums() -> Iterator[None]:
    """Scores and sums in float32 in the math back end: ComfyUI lets it have them in half precision, to save memory."""
    allow = getattr(torch.backends.cuda, "allow_fp16_bf16_reduction_math_sdp", None)
    if allow is None or not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed():
        yield
        return
    allow(False)
    try:
        yield
    finally:
        allow(True)


def _load_any() -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        with _FLAGS:
            return _attend(q, k, v, mask, scale, True)

    return run


def _loader(backend: SDPBackend) -> Callable[[], Run]:
    def load() -> Run:
        def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
            with _FLAGS, sdpa_kernel(backend), _full_sums():
                return _attend(q, k, v, mask, scale, False)

        return run

    return load


def _cuda_only(reason: str, refused: Callable[[AttentionCall], bool]) -> Callable[[AttentionCall, Machine], str | None]:
    def rule(call: AttentionCall, _machine: Machine) -> str | None:
        return reason if _is_cuda(call) and refused(call) else None

    return rule


def _no_cudnn_plans(device: Device, _machine: Machine) -> str | None:
    if device.capability == (10, 3):
        return "cuDNN finds no valid execution plans on sm_103"
    return None


def _few_kv_heads(call: AttentionCall, machine: Machine) -> str | None:
    """PyTorch 2.11 to 2.13 on B200: wrong numbers without an error."""
    found = parse_version(machine.torch)
    if machine.device(call.device).capability != (10, 0) or call.kv_heads >= 8 or found is None:
        return None
    if not (2, 11) <= found[0][:2] <= (2, 13):
        return None
    return f"PyTorch {machine.torch} on sm_100 gives wrong numbers below 8 key heads, this has {call.kv_heads}"


def _kernel(
    name: str,
    title: str,
    load: Callable[[], Run],
    needs: Needs,
    memory: Callable[[AttentionCall], int],
    needs_proof: bool = True,
    lse: RunLse | None = None,
) -> Kernel:
    return Kernel(
        name=name,
        title=title,
        package="torch",
        layout=Layout.BHND,
        precision="exact",
        tolerance={dtype: EXACT[dtype] for dtype in needs.dtypes},
        load=load,
        needs=needs,
        url=_URL,
        needs_proof=needs_proof,
        workspace_bytes=memory,
        load_lse=None if lse is None else lambda: lse,
    )


KERNELS = (
    _kernel(
        "sdpa",
        "PyTorch attention, its own choice",
        _load_any,
        Needs(
            devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
            dtypes=FULL,
            head_dims=range(1, 4097),
            masks=ANY_MASK,
            gqa=True,
            other_v_dim=True,
        ),
        any_bytes,
        needs_proof=False,
        lse=any_lse,
    ),
    _kernel(
        "sdpa_flash",
        "PyTorch attention, FlashAttention back end",
        _loader(SDPBackend.FLASH_ATTENTION),
        Needs(
            devices=frozenset({"cpu", "cuda"}),
            sm=(((8, 0), (999, 9)),),
            dtypes=FULL,
            head_dims=range(1, 4097),
            masks=ANY_MASK,
            gqa=True,
            call_rules=(
                _cuda_only("takes no mask on CUDA", lambda call: call.mask is not None),
                _cuda_only("needs float16 or bfloat16 on CUDA", lambda call: call.dtype not in HALF),
                _cuda_only("needs a head dimension of at most 256 on CUDA", lambda call: call.head_dim > 256),
            ),
        ),
        fused_bytes,
        lse=flash_lse,
    ),
    _kernel(
        "sdpa_efficient",
        "PyTorch attention, memory-efficient back end",
        _loader(SDPBackend.EFFICIENT_ATTENTION),
        Needs(
            sm=(((5, 0), (999, 9)),),
            dtypes=FULL,
            head_dims=range(8, 4097, 8),
            masks=ANY_MASK,
            other_v_dim=True,
            call_rules=(v_dim_by_8,),
        ),
        fused_bytes,
        lse=efficient_lse,
    ),
    _kernel(
        "sdpa_cudnn",
        "PyTorch attention, cuDNN back end",
        _loader(SDPBackend.CUDNN_ATTENTION),
        Needs(
            sm=(((8, 0), (999, 9)),),
            dtypes=HALF,
            head_dims=range(8, 129, 8),
            masks=ANY_MASK,
            gqa=True,
            machine_rules=(needs_nvidia, _no_cudnn_plans),
            call_rules=(_few_kv_heads,),
        ),
        fused_bytes,
        lse=cudnn_lse,
    ),
    _kernel(
        "sdpa_math",
        "PyTorch attention, written out (materialises the scores)",
        _loader(SDPBackend.MATH),
        Needs(
            devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
            dtypes=FULL,
            head_dims=range(1, 4097),
            masks=ANY_MASK,
            gqa=True,
            other_v_dim=True,
        ),
        math_bytes,
        needs_proof=False,
    ),
)
