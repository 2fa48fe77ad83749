"""FlashAttention 2, 3 and 4: (B, N, H, D), no masks, grouped queries native.

Limits: flash-attn 2.8.3.post2 (flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp, and hopper/ for
FlashAttention 3), flash-attn-4 4.0.0b4 to 4.0.0b36 (flash_attn/cute/interface.py).
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import Tensor

from ..attention.call import AttentionCall, Layout
from ..attention.kernel import Kernel, MachineRule, Needs, Run
from ..attention.machine import Device, Machine
from ._common import (
    EXACT,
    HALF,
    chosen,
    lse_bytes,
    needs_version,
    on_device,
    padded_bytes,
    rows,
    source,
    upright,
    upright_bytes,
    version_of,
)


def _loader(name: str, package: str, module: str, package_rules: tuple[MachineRule, ...], lse: bool) -> Any:
    """A function that loads `flash_attn_func` of what the kernel comes from: as a Run, with `lse` as a RunLse."""

    def load() -> Any:
        attend = source(name, package, module, package_rules).flash_attn_func
        # FlashAttention 2 and later builds of 3, FlashAttention 4; early builds of 3 are not asked.
        known = inspect.signature(attend).parameters if lse else ()
        asked = {option: True for option in ("return_attn_probs", "return_lse") if option in known}

        def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Any:
            if mask is not None:
                raise ValueError("FlashAttention takes no mask")
            q, scale = upright(q, scale)
            out = attend(rows(q), rows(k), rows(v), softmax_scale=scale, **asked)
            # Early builds of FlashAttention 3 and all of 4 return (out, log-sum-exp) also to those who do not ask.
            if not lse:
                return out[0] if isinstance(out, tuple) else out
            if not isinstance(out, tuple) or out[1] is None:
                raise RuntimeError(f"this build of {package} gives no log-sum-exp")
            return out[:2]

        return on_device(cast(Run, run))

    return load


def _really_version_2(_device: Device, machine: Machine) -> str | None:
    """FlashAttention 4 lies in a folder flash_attn too, without the rest."""
    if version_of(machine, "flash_attn") is None and "flash_attn.cute" in machine.packages:
        return "package flash_attn here is FlashAttention 4's; flash-attn itself is not installed"
    return None


def _really_version_4(_device: Device, machine: Machine) -> str | None:
    """flash-attn 2.8 carries an early copy of flash_attn/cute that needs what it does not install."""
    if version_of(machine, "flash_attn.cute") is None and version_of(machine, "flash_attn") is not None:
        return (
            f"flash_attn.cute here is the early copy inside flash-attn {machine.packages['flash_attn']}; "
            "flash-attn-4 itself is not installed"
        )
    return None


_FROM_B5 = needs_version("flash_attn.cute", at_least="4.0.0b5")


def _arch_of_version_4(device: Device, machine: Machine) -> str | None:
    """4.0.0b4 takes 9.x to 11.x, 4.0.0b5 and later 8.x and 12.x as well."""
    if device.capability is None or device.capability[0] not in (8, 12):
        return None
    reason = _FROM_B5(device, machine)
    return f"{reason} (for {device.sm})" if reason else None


# What has a kernel for heads of 256 on Blackwell; 4.0.0b14 has none for 11.x.
_WITH_256 = {
    10: needs_version("flash_attn.cute", at_least="4.0.0b11"),
    11: needs_version("flash_attn.cute", at_least="4.0.0b18"),
}


def _dims_of_version_4(call: AttentionCall, machine: Machine) -> str | None:
    device = machine.device(call.device)
    if device.capability is None or call.head_dim <= 128 or device.capability[0] == 9:
        return None
    dim_256 = _WITH_256.get(device.capability[0])
    if dim_256 is not None and call.head_dim == 256:
        reason = dim_256(device, machine)
        return f"{reason} (for a head dimension of 256 on {device.sm})" if reason else None
    also = " or of 256" if dim_256 else ""
    return f"needs a head dimension of at most 128{also} on {device.sm}, this is {call.head_dim}"


def _workspace(call: AttentionCall) -> int:
    return lse_bytes(call) + padded_bytes(call, -(-call.head_dim // 8) * 8) + upright_bytes(call)


def _kernel(name: str, title: str, package: str, module: str, needs: Needs, install: str) -> Kernel:
    return Kernel(
        name=name,
        title=title,
        package=package,
        layout=Layout.BNHD,
        precision="exact",
        tolerance={dtype: EXACT[dtype] for dtype in HALF},
        load=_loader(name, package, module, needs.package_rules, lse=False),
        load_lse=_loader(name, package, module, needs.package_rules, lse=True),
        needs=needs,
        install=install,
        url="https://github.com/Dao-AILab/flash-attention",
        workspace_bytes=_workspace,
    )


KERNELS = (
    _kernel(
        "flash2",
        "FlashAttention 2",
        "flash_attn",
        "flash_attn",
        Needs(
            sm=(((8, 0), (999, 9)),),
            head_dims=range(1, 257),
            gqa=True,
            package_rules=(_really_version_2,),
            machine_rules=chosen(needs_version("flash_attn", at_least="2.0", below="3")),
        ),
        "pip install flash-attn --no-build-isolation (compiles; needs the CUDA toolkit)",
    ),
    _kernel(
        "flash3",
        "FlashAttention 3",
        "flash_attn_interface",
        "flash_attn_interface",
        # Its source accepts sm_80 and newer, its builds hold Hopper's kernels; elsewhere its check ends the process.
        Needs(sm=(((9, 0), (9, 0)),), head_dims=range(8, 257, 8), gqa=True, machine_rules=chosen()),
        "build the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
    _kernel(
        "flash4",
        "FlashAttention 4",
        "flash_attn.cute",
        "flash_attn.cute.interface",
        Needs(
            sm=(((8, 0), (12, 9)),),
            head_dims=range(8, 257, 8),
            gqa=True,
            package_rules=(_really_version_4,),
            machine_rules=chosen(_arch_of_version_4),
            call_rules=(_dims_of_version_4,),
        ),
        "pip install --pre flash-attn-4",
    ),
)
