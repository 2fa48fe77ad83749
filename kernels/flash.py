"""FlashAttention 2, 3 and 4: (B, N, H, D), no masks, grouped queries native.

Limits: flash-attn 2.8.3.post2 (flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp, and hopper/ for
FlashAttention 3), flash-attn-4 4.0.0b4 to 4.0.0b36 (flash_attn/cute/interface.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from ..attention.call import AttentionCall, Layout
from ..attention.kernel import Kernel, MachineRule, Needs, Run, RunLse
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

_URL = "https://github.com/Dao-AILab/flash-attention"
_TOLERANCE = {dtype: EXACT[dtype] for dtype in HALF}


def _loader(name: str, package: str, module: str, *package_rules: MachineRule) -> Callable[[], Run]:
    def load() -> Run:
        attend = source(name, package, module, package_rules).flash_attn_func

        def run(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            mask: torch.Tensor | None = None,
            scale: float | None = None,
        ) -> torch.Tensor:
            if mask is not None:
                raise ValueError("FlashAttention takes no mask")
            q, scale = upright(q, scale)
            out = attend(rows(q), rows(k), rows(v), softmax_scale=scale)
            # Early builds of FlashAttention 3 return (out, log-sum-exp), FlashAttention 4 always does.
            result: torch.Tensor = out[0] if isinstance(out, tuple) else out
            return result

        return on_device(run)

    return load


def _lse_loader(name: str, package: str, module: str, *package_rules: MachineRule) -> Callable[[], RunLse]:
    def load() -> RunLse:
        attend = source(name, package, module, package_rules).flash_attn_func
        known = inspect.signature(attend).parameters
        # FlashAttention 2 and later builds of 3, FlashAttention 4; early builds of 3 are not asked.
        asked = {option: True for option in ("return_attn_probs", "return_lse") if option in known}

        def run(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            mask: torch.Tensor | None = None,
            scale: float | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if mask is not None:
                raise ValueError("FlashAttention takes no mask")
            q, scale = upright(q, scale)
            out = attend(rows(q), rows(k), rows(v), softmax_scale=scale, **asked)
            if not isinstance(out, tuple) or out[1] is None:
                raise RuntimeError(f"this build of {package} gives no log-sum-exp")
            return out[0], out[1]

        return on_device(run)

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


_FROM_B12 = needs_version("flash_attn.cute", at_least="4.0.0b12")


def _arch_of_version_4(device: Device, machine: Machine) -> str | None:
    """4.0.0b4 takes 9.x to 11.x, 4.0.0b12 and later 8.x and 12.x as well."""
    if device.capability is None or device.capability[0] not in (8, 12):
        return None
    reason = _FROM_B12(device, machine)
    return f"{reason} (for {device.sm})" if reason else None


def _dims_of_version_4(call: AttentionCall, machine: Machine) -> str | None:
    device = machine.device(call.device)
    if device.capability is None or call.head_dim <= 128 or device.capability[0] == 9:
        return None
    if call.head_dim == 256 and device.capability[0] in (10, 11):
        return None
    also = " or of 256" if device.capability[0] in (10, 11) else ""
    return f"needs a head dimension of at most 128{also} on {device.sm}, this is {call.head_dim}"


def _workspace(call: AttentionCall) -> int:
    return lse_bytes(call) + padded_bytes(call, -(-call.head_dim // 8) * 8) + upright_bytes(call)


KERNELS = (
    Kernel(
        name="flash2",
        title="FlashAttention 2",
        package="flash_attn",
        layout=Layout.BNHD,
        precision="exact",
        tolerance=_TOLERANCE,
        load=_loader("flash2", "flash_attn", "flash_attn", _really_version_2),
        load_lse=_lse_loader("flash2", "flash_attn", "flash_attn", _really_version_2),
        needs=Needs(
            sm=(((8, 0), (999, 9)),),
            head_dims=range(1, 257),
            gqa=True,
            package_rules=(_really_version_2,),
            machine_rules=chosen(needs_version("flash_attn", at_least="2.0", below="3")),
        ),
        install="pip install flash-attn --no-build-isolation (compiles; needs the CUDA toolkit)",
        url=_URL,
        workspace_bytes=_workspace,
    ),
    Kernel(
        name="flash3",
        title="FlashAttention 3",
        package="flash_attn_interface",
        layout=Layout.BNHD,
        precision="exact",
        tolerance=_TOLERANCE,
        load=_loader("flash3", "flash_attn_interface", "flash_attn_interface"),
        load_lse=_lse_loader("flash3", "flash_attn_interface", "flash_attn_interface"),
        # Its source accepts sm_80 and newer, its builds hold Hopper's kernels; elsewhere its check ends the process.
        needs=Needs(sm=(((9, 0), (9, 0)),), head_dims=range(8, 257, 8), gqa=True, machine_rules=chosen()),
        install="build the folder hopper of github.com/Dao-AILab/flash-attention",
        url=_URL,
        workspace_bytes=_workspace,
    ),
    Kernel(
        name="flash4",
        title="FlashAttention 4",
        package="flash_attn.cute",
        layout=Layout.BNHD,
        precision="exact",
        tolerance=_TOLERANCE,
        load=_loader("flash4", "flash_attn.cute", "flash_attn.cute.interface", _really_version_4),
        load_lse=_lse_loader("flash4", "flash_attn.cute", "flash_attn.cute.interface", _really_version_4),
        needs=Needs(
            sm=(((8, 0), (12, 9)),),
            head_dims=range(8, 257, 8),
            gqa=True,
            package_rules=(_really_version_4,),
            machine_rules=chosen(_arch_of_version_4),
            call_rules=(_dims_of_version_4,),
        ),
        install="pip install --pre flash-attn-4",
        url=_URL,
        workspace_bytes=_workspace,
    ),
)
