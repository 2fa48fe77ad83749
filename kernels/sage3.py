"""SageAttention 3: 4-bit attention for consumer Blackwell. It ignores masks and the scale, and has no grouped queries.

Limits: github.com/thu-ml/SageAttention, sageattention3_blackwell: sageattn3/api.py at 27b740f,
sageattn3/blackwell/api.cu at 726ebdb (12.0; later builds take 12.1), quantization/fp4_quantization_4d.cu at e08749b.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..attention.call import AttentionCall, Layout
from ..attention.kernel import Kernel, Needs, Run
from ..attention.machine import Machine
from ._common import HALF, chosen, counts, needs_cuda, on_device, source

_BLOCK = 128  # tokens are padded to multiples of it


def _function(kernel: str) -> Callable[..., Tensor]:
    """Newer builds export the function from the package, older ones only from its module `api`."""
    module = source(kernel, "sageattn3", "sageattn3")
    found: Callable[..., Tensor] | None = getattr(module, "sageattn3_blackwell", None)
    if found is None and module.__name__ != "sageattn3":
        raise ImportError(f"the fetched kernel in {module.__file__} has no sageattn3_blackwell")
    if found is None:
        found = importlib.import_module("sageattn3.api").sageattn3_blackwell
    return found


def _loader(kernel: str, per_block_mean: bool) -> Callable[[], Run]:
    def load() -> Run:
        attend = _function(kernel)

        def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
            if mask is not None:
                raise ValueError("SageAttention 3 would ignore the mask")
            if not _is_usual(scale, q.shape[3]):
                raise ValueError(f"SageAttention 3 would ignore the scale {scale}")
            # It subtracts the mean from k in place.
            return attend(q, k.clone(memory_format=torch.contiguous_format), v, per_block_mean=per_block_mean)

        return on_device(run)

    return load


def _is_usual(scale: float | None, dim: int) -> bool:
    return scale is None or math.isclose(scale, dim**-0.5, rel_tol=1e-4)


def _usual_scale(call: AttentionCall, _machine: Machine) -> str | None:
    if _is_usual(call.scale, call.head_dim):
        return None
    return f"ignores the scale: it is always {call.head_dim**-0.5:.6g}, the call asks for {call.scale:g}"


def _workspace(call: AttentionCall, blocks: int) -> int:
    q_len, kv_len = (-(-length // _BLOCK) * _BLOCK for length in (call.q_len, call.kv_len))
    pairs = call.batch * call.heads
    size = call.dtype.itemsize
    queries, keys = pairs * q_len * call.head_dim, pairs * kv_len * call.head_dim
    # Padded q, k, v and q without its mean; our copy of k; 4-bit numbers with a scale for each 16 of them; the padded
    # output; and the correction term in the tensors' type and in float32.
    padded = (2 * queries + 2 * keys) * size + counts(call)[1] * size
    packed = (queries + 2 * keys) * 9 // 16
    return padded + packed + queries * size + pairs * blocks * kv_len * (size + 4)


def _whole(call: AttentionCall) -> int:
    return _workspace(call, 1)


def _per_block(call: AttentionCall) -> int:
    return _workspace(call, -(-call.q_len // _BLOCK))


def _kernel(name: str, title: str, per_block_mean: bool, memory: Callable[[AttentionCall], int]) -> Kernel:
    return Kernel(
        name=name,
        title=title,
        package="sageattn3",
        layout=Layout.BHND,
        precision="lossy",
        # 4-bit numbers; a wide guess until it is measured on a GPU.
        tolerance=dict.fromkeys(HALF, 0.3),
        load=_loader(name, per_block_mean),
        needs=Needs(
            sm=(((12, 0), (12, 1)),),
            head_dims=frozenset({64, 128}),
            triton=True,
            machine_rules=chosen(needs_cuda("12.8")),
            call_rules=(_usual_scale,),
        ),
        install="build the folder sageattention3_blackwell of github.com/thu-ml/SageAttention",
        url="https://github.com/thu-ml/SageAttention/tree/main/sageattention3_blackwell",
        workspace_bytes=memory,
    )


KERNELS = (
    _kernel("sage3", "SageAttention 3 (4-bit)", False, _whole),
    _kernel("sage3_per_block_mean", "SageAttention 3 (4-bit, mean per block)", True, _per_block),
)
