"""comfy-kitchen's int8 attention: masks that broadcast, grouped queries, any head dimension up to 256.

Limits: comfy-kitchen 0.2.40, comfy_kitchen/sage_attention.py. 0.2.26, which ComfyUI 0.30 installs, has none of it.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..attention.call import AttentionCall, Layout
from ..attention.kernel import Kernel, Needs, Run
from ._common import ANY_MASK, FULL, counts, needs_version, rows, upright, upright_bytes


def _load() -> Run:
    module = importlib.import_module("comfy_kitchen")
    if not module.int8_attention_is_available():
        raise ImportError(
            "comfy-kitchen's compiled part does not run int8 attention here: it needs sm_75 or newer with a driver "
            "for CUDA 13, or an AMD GPU with matrix cores"
        )
    attend = module.int8_attention

    def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        q, scale = upright(q, scale)
        if mask is not None and mask.dtype is torch.float64:
            mask = mask.float()
        out: Tensor = attend(rows(q), rows(k), rows(v), scale=scale, attn_mask=mask)
        return out

    return run


def _workspace(call: AttentionCall) -> int:
    dim = next(size for size in (64, 128, 256) if call.head_dim <= size)
    keys = -(-call.kv_len // 128) * 128
    q, k, v, out = (count // call.head_dim * dim for count in counts(call))
    padded = (q + k + v) * call.dtype.itemsize if call.head_dim != dim else 0
    if call.head_dim != dim or call.dtype is torch.float32:
        padded += out * 2  # its own output, in 16 bits or with wider heads
    scales = 4 * (call.batch * call.heads * -(-call.q_len // 2) + call.batch * call.kv_heads * (keys // 16 + dim))
    key_mask = 4 * call.mask.shape[0] * call.mask.shape[1] * (keys + keys // 32) if call.mask else 0
    return q + k + v // call.kv_len * keys + padded + scales + key_mask + upright_bytes(call)


KERNELS = (
    Kernel(
        name="kitchen_int8",
        title="comfy-kitchen int8",
        package="comfy_kitchen",
        layout=Layout.BHND,
        precision="lossy",
        # Simulated error of 8-bit weights on inputs with biases and spikes, about doubled. Not measured on a GPU.
        tolerance=dict.fromkeys(FULL, 0.15),
        load=_load,
        needs=Needs(
            sm=(((7, 5), (999, 9)),),
            dtypes=FULL,
            head_dims=range(1, 257),
            masks=ANY_MASK,
            gqa=True,
            machine_rules=(
                # 0.2.30 has an alignment error, 0.2.36 corrupts masked calls on RDNA3.
                needs_version("comfy_kitchen", at_least="0.2.40", why="int8 attention is missing or faulty before"),
            ),
        ),
        install="pip install --upgrade comfy-kitchen",
        url="https://github.com/Comfy-Org/comfy-kitchen",
        workspace_bytes=_workspace,
    ),
)
