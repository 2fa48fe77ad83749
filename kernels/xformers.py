"""xformers: its own choice of operator, and its CUTLASS operator alone.

Limits: xformers/ops/fmha/{common,cutlass,flash,flash3,dispatch}.py of 0.0.29.post3 to 0.0.35.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention.call import AttentionCall, Layout
from ..attention.kernel import ExtraRule, Kernel, MachineRule, Needs, Run
from ..attention.machine import Device, Machine
from ._common import (
    ANY_MASK,
    EXACT,
    FULL,
    HALF,
    as_bias,
    capability,
    chosen,
    lse_bytes,
    mask_count,
    needs_version,
    rows,
    upright,
    upright_bytes,
    v_dim_by_8,
    version_of,
)

_HOPPER = (9, 0)
_HOPPER_ONLY = ((0, 0, 30), 0, 0), ((0, 0, 33), 0, 0)
_CUTLASS_ENDS = ((0, 0, 33), 0, 0)  # from here on its CUTLASS operator refuses what is newer than Hopper
# xformers raises at import where the flash-attn beside it is newer than it knows (FLASH_VER_LAST in fmha/flash.py).
# 0.0.29.post3 and older fall back instead.
_NEWEST_FLASH = (
    (((0, 0, 33), 0, 0), (2, 8, 4)),
    (((0, 0, 32), 0, 0), (2, 8, 2)),
    (((0, 0, 31), 0, 0), (2, 8, 0)),
    (((0, 0, 30), 0, 0), (2, 7, 4)),
)
_OLDEST_FLASH = (2, 7, 1)
_WHOLE_VERSIONS = ((0, 0, 32), 0, 0)  # from here on 2.8.4.post1 is newer than 2.8.4; before, three numbers count
# xformers.ops.fmha, q and the mask → the operator to name, None for its own choice.
Pick = Callable[[Any, Tensor, Tensor | None], Any]


def _flash_attn_fits(_device: Device, machine: Machine) -> str | None:
    """xformers cannot be imported beside a flash-attn that it does not know."""
    found = version_of(machine, "xformers")
    if found is None or os.environ.get("XFORMERS_IGNORE_FLASH_VERSION_CHECK", "0") == "1":
        return None
    newest = next((flash for since, flash in _NEWEST_FLASH if found >= since), None)
    if newest is None:
        return None
    flash = version_of(machine, "flash_attn")
    if flash is None:
        if "flash_attn.cute" in machine.packages:
            return (
                f"xformers {machine.packages['xformers']} takes the package flash_attn, FlashAttention 4 here, "
                "for FlashAttention 2 and cannot be imported"
            )
        return None
    known = flash if found >= _WHOLE_VERSIONS else (flash[0][:3], 0, 0)
    if (_OLDEST_FLASH, 0, 0) <= known <= (newest, 0, 0):
        return None
    return (
        f"xformers {machine.packages['xformers']} cannot be imported beside flash-attn "
        f"{machine.packages['flash_attn']}: it needs {'.'.join(map(str, _OLDEST_FLASH))} to "
        f"{'.'.join(map(str, newest))}, or none"
    )


def _hopper_kernels_elsewhere(device: Device, machine: Machine) -> str | None:
    """0.0.30 to 0.0.32.post2 send GPUs newer than Hopper to Hopper's kernels; their check ends the process.

    https://github.com/facebookresearch/xformers/issues/1251 and /1329.
    """
    found, (first, end) = version_of(machine, "xformers"), _HOPPER_ONLY
    if found is None or not first <= found < end:
        return None
    if device.capability is None or device.capability <= _HOPPER:
        return None
    return f"xformers {machine.packages['xformers']} runs Hopper's kernels on {device.sm}; needs 0.0.33 or newer"


def _no_cutlass(device: Device, machine: Machine) -> bool:
    found = version_of(machine, "xformers")
    newer = device.capability is not None and device.capability > _HOPPER
    return newer and found is not None and found >= _CUTLASS_ENDS


def _cutlass_ends_at_hopper(device: Device, machine: Machine) -> str | None:
    if _no_cutlass(device, machine):
        return f"CUTLASS of xformers {machine.packages['xformers']} needs sm_90 or older, this GPU is {device.sm}"
    return None


def _flash_only(call: AttentionCall, machine: Machine) -> str | None:
    """On GPUs newer than Hopper only FlashAttention 2 is left in it."""
    device = machine.device(call.device)
    if not _no_cutlass(device, machine):
        return None
    wanted = []
    if call.mask is not None:
        wanted.append("no mask")
    if call.dtype not in HALF:
        wanted.append("float16 or bfloat16")
    if call.head_dim > 256 or call.head_dim != call.v_dim:
        wanted.append("one head dimension of at most 256")
    if not wanted:
        return None
    return f"xformers {machine.packages['xformers']} on {device.sm} needs {' and '.join(wanted)}"


def _bf16(call: AttentionCall, machine: Machine) -> str | None:
    device = machine.device(call.device)
    if call.dtype is torch.bfloat16 and device.capability is not None and device.capability < (8, 0):
        return f"needs sm_80 or newer for bfloat16, this GPU is {device.sm}"
    return None


def _bias(mask: Tensor, batch: int, heads: int, q_len: int, kv_len: int, dtype: torch.dtype) -> Tensor:
    """A mask as xformers wants it: a number for each pair, rows starting at multiples of 8, nothing broadcast."""
    bias = as_bias(mask, dtype)
    if bias.shape[3] != kv_len:
        bias = bias.expand(-1, -1, -1, kv_len)
    strides = bias.stride()
    if strides[3] != 1 or any(stride % 8 for stride, size in zip(strides[:3], bias.shape[:3], strict=True) if size > 1):
        padded = torch.empty(*bias.shape[:3], -(-kv_len // 8) * 8, dtype=dtype, device=bias.device)
        bias = padded[..., :kv_len].copy_(bias)
    elif any(stride % 8 for stride in strides[:3]):
        # A dimension of one: any stride says the same, and 0 is a multiple of 8.
        wanted = [0 if size == 1 else stride for stride, size in zip(strides[:3], bias.shape[:3], strict=True)]
        bias = bias.as_strided(bias.shape, (*wanted, 1))
    # A stride of 0 broadcasts without a copy.
    return bias.expand(batch, heads, q_len, kv_len)


def _plain_choice(fmha: Any, q: Tensor, mask: Tensor | None) -> Any:
    """The operator to name: none, except where xformers' own choice may be FlashAttention 3 off Hopper.

    0.0.33 and 0.0.34 try it first on sm_80 to sm_90; on sm_89 it reads memory that is not there.
    """
    found = capability(q)
    if found is None or found == _HOPPER or found < (8, 0) or mask is not None:
        return None
    if q.dtype not in HALF or q.shape[3] > 256:
        return None
    flash = fmha.MemoryEfficientAttentionFlashAttentionOp
    return flash if flash[0].is_available() else None


def _cutlass_alone(fmha: Any, _q: Tensor, _mask: Tensor | None) -> Any:
    return fmha.MemoryEfficientAttentionCutlassOp


def _loader(pick: Pick) -> Callable[[], Run]:
    def load() -> Run:
        fmha = importlib.import_module("xformers.ops.fmha")

        def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
            op = pick(fmha, q, mask)
            q, scale = upright(q, scale)
            q, k, v = rows(q), rows(k), rows(v)
            batch, q_len, heads, _ = q.shape
            _, kv_len, kv_heads, _ = k.shape
            bias = None if mask is None else _bias(mask, batch, heads, q_len, kv_len, q.dtype)
            if kv_heads == heads:
                out: Tensor = fmha.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale, op=op)
                return out
            # Grouped queries: (B, N, groups, heads per group, D), keys and values repeated by a stride of 0.
            shape = (kv_heads, heads // kv_heads)
            q = q.unflatten(2, shape)
            k, v = (t.unsqueeze(3).expand(-1, -1, -1, shape[1], -1) for t in (k, v))
            bias = None if bias is None else bias.unflatten(1, shape)
            out = fmha.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale, op=op)
            return out.flatten(2, 3)

        return run

    return load


def _workspace(call: AttentionCall) -> int:
    keys = -(-call.kv_len // 8) * 8
    copied = mask_count(call) * call.dtype.itemsize * keys // call.kv_len if call.mask else 0
    return lse_bytes(call) + 2 * copied + upright_bytes(call)


_RULES = chosen(_flash_attn_fits, needs_version("xformers", at_least="0.0.20", why="older ones were never looked at"))
_MANY = needs_version("xformers", at_least="0.0.27")


def _many_heads(call: AttentionCall, machine: Machine) -> str | None:
    """0.0.21 to 0.0.26 give wrong results for more than 65535 batch·heads."""
    many = call.batch * call.heads
    if many <= 65535:
        return None
    reason = _MANY(machine.device(call.device), machine)
    return f"{reason}: it takes at most 65535 batch·heads, this is {many}" if reason else None


def _kernel(name: str, title: str, pick: Pick, machine_rule: MachineRule, *call_rules: ExtraRule) -> Kernel:
    return Kernel(
        name=name,
        title=title,
        package="xformers",
        layout=Layout.BNHD,
        precision="exact",
        tolerance=EXACT,
        load=_loader(pick),
        needs=Needs(
            sm=(((5, 0), (999, 9)),),
            dtypes=FULL,
            head_dims=range(8, 4097, 8),
            masks=ANY_MASK,
            gqa=True,
            other_v_dim=True,
            machine_rules=(*_RULES, machine_rule),
            call_rules=(*call_rules, v_dim_by_8, _bf16, _many_heads),
        ),
        install="pip install the xformers release made for your PyTorch version",
        url="https://github.com/facebookresearch/xformers",
        workspace_bytes=_workspace,
    )


KERNELS = (
    _kernel("xformers", "xformers, its own choice", _plain_choice, _hopper_kernels_elsewhere, _flash_only),
    _kernel("xformers_cutlass", "xformers, CUTLASS only", _cutlass_alone, _cutlass_ends_at_hopper),
)
