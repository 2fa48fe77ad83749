"""The default for everything that has no node: `COMFYUI_ATTENTION_MECHANISM` in the environment.

Opt-in and for the whole process: every call of the host's attention functions goes through one router, also from VAEs,
text encoders, ControlNets and models that pass no options. A node on a model still decides for that model. Direct calls
of `torch.nn.functional.scaled_dot_product_attention` are out of reach. `remove()` leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from ..attention.builds import Build
from ..attention.kernel import Kernel, machine_reasons
from ..attention.link import HostLink
from ..attention.machine import Machine
from ..attention.plan import HOST, expand
from ..attention.policy import KERNEL_NAMES, Policy, Rule
from ..attention.router import Router
from ..attention.session import CURRENT, set_default_router
from ..doctor.env_file import VARIABLE
from ..kernels import KERNELS
from . import trampoline

log = logging.getLogger("attune")
_GLOBAL = "__attune_vae_attention__"
_NAME = "the function's name"
_VAE_FUNCTIONS = ("normal_attention", "pytorch_attention", "xformers_attention")


def wanted_kernel(environment: Mapping[str, str] | None = None) -> str | None:
    """The kernel that the environment names, or None. An unknown name is said once in the log and changes nothing."""
    environment = os.environ if environment is None else environment
    name = environment.get(VARIABLE, "").strip().lower()
    if not name:
        return None
    if name not in KERNEL_NAMES:
        log.warning(
            "%s=%s names no attention kernel; nothing is changed. The names are: %s.",
            VARIABLE,
            environment[VARIABLE],
            ", ".join(KERNEL_NAMES),
        )
        return None
    return name


def _routed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a VAE's attention function does instead: its code is put there, with the function's name for _NAME."""
    return __attune_vae_attention__("the function's name", q, k, v)  # type: ignore[name-defined]  # noqa: F821


class Default:
    """The default in force. `vae_module` is the host's module whose functions VAEs keep on their instances."""

    def __init__(
        self,
        name: str,
        kernels: Mapping[str, Kernel],
        machine: Machine,
        link: HostLink,
        attention_module: ModuleType,
        vae_module: ModuleType | None,
    ) -> None:
        self.name = name
        self.router = Router(Policy((Rule((name,), source="environment"),)), kernels, machine, link)
        self._attention_module = attention_module
        self._vae_module = vae_module
        self._installed: AbstractContextManager[None] | None = None
        self._codes: dict[str, CodeType] = {}

    def apply(self) -> None:
        """Put the default in force, until `remove`. There may be one at a time."""
        self._installed = trampoline.installed(self._attention_module)
        self._installed.__enter__()
        set_default_router(self.router)
        if self._vae_module is not None:
            self._route_vae(self._vae_module)

    def remove(self) -> None:
        """Take everything back."""
        set_default_router(None)
        for name, code in self._codes.items():
            vars(self._vae_module)[name].__code__ = code
        self._codes.clear()
        if self._vae_module is not None:
            vars(self._vae_module).pop(_GLOBAL, None)
        if self._installed is not None:
            self._installed.__exit__(None, None, None)
            self._installed = None

    def account(self) -> dict[str, Any]:
        """What was asked for, what ran and what was refused since the start, as plain data."""
        self.router.flush_idle()
        record = self.router.idle_session.record
        node = record.nodes()["environment"].as_dict()
        return {**{key: node[key] for key in ("requested", "observed", "refused")}, "notes": record.notes}

    def _route_vae(self, module: ModuleType) -> None:
        """VAEs hold these functions on their instances, made before and after: so the functions change inside."""
        originals = {}
        for name in _VAE_FUNCTIONS:
            function = vars(module).get(name)
            if isinstance(function, FunctionType) and not function.__code__.co_freevars:
                self._codes[name] = function.__code__
                originals[name] = FunctionType(function.__code__, function.__globals__, name)
                code = _routed.__code__
                constants = tuple(name if one == _NAME else one for one in code.co_consts)
                function.__code__ = code.replace(co_name=name, co_consts=constants)
        vars(module)[_GLOBAL] = lambda name, q, k, v: self._vae_attention(originals[name], q, k, v)

    def _vae_attention(self, original: FunctionType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One head over all positions: (B, C, …) is (B, 1, N, C) to a kernel. `original` has the same arguments."""
        if CURRENT.get() is not None:
            out: torch.Tensor = original(q, k, v)
            return out
        batch, channels = q.shape[:2]
        rows = [t.reshape(batch, 1, channels, -1).transpose(2, 3) for t in (q, k, v)]

        def host(*_args: Any, **_options: Any) -> torch.Tensor:
            result: torch.Tensor = original(q, k, v)
            return result.reshape(batch, 1, channels, -1).transpose(2, 3)

        out = self.router.route(host, *rows, 1, skip_reshape=True, skip_output_reshape=True)
        return out.transpose(2, 3).reshape(q.shape)


def _package(machine: Machine, name: str) -> str:
    """ "sageattention 2.2.0 (CUDA 12.8; _qattn_sm80, _qattn_sm89)": its version, and what tells builds of it apart."""
    build, version = machine.builds.get(name, Build()), machine.packages[name]
    built = () if "+" in version else build.built  # 2.2.0+cu128torch2.8.0 says it already
    compiled = [module for module in build.modules if "sm" in module]  # the others are in every build of a package
    told = "; ".join(", ".join(part) for part in (built, compiled) if part)
    return f"{name} {version}".strip() + (f" ({told})" if told else "")


def _selected(machine: Machine, name: str | None) -> str:
    """The kernel that `name` comes to by the machine's description alone, and why; nothing is run to find it."""
    own = f"ComfyUI's own, {machine.host_attention or 'unknown'}"
    if machine.host_flag:
        own += f" by {machine.host_flag}"
    if name is None:
        return f"{HOST} ({own}; nodes and {VARIABLE} can name another)"
    kernels = {kernel.name: kernel for kernel in KERNELS}
    wished = expand(name, machine)
    why = ""
    for one in wished:
        # Those that exist only inside ComfyUI are made later and run on every machine.
        if one in kernels and (reasons := machine_reasons(kernels[one], machine)):
            why = "; ".join(reasons) if wished == (name,) else "none of its kernels can, `attune kernels` says why"
        elif one == HOST:
            return f"{HOST} ({VARIABLE}={name}: {own})"
        elif wished == (name,):
            return f"{name} ({VARIABLE}; where it cannot run: {own})"
        else:
            first = "its first choice that this machine can run; the doctor's verdicts may still change it"
            return f"{one} ({VARIABLE}={name}: {first}; where none can run: {own})"
    return f"{HOST} ({own}; {VARIABLE}={name} cannot run here: {why})"


def summary(machine: Machine, name: str | None) -> list[str]:
    """The lines of the start-up block: the machine, and what computes attention where no node says otherwise."""
    lines = ["GPU Configuration Summary"]
    for device in machine.devices:
        lines.append(f"  {device.name}: {device.title} ({device.kind}){f', {device.room}' if device.room else ''}")
    parts = [f"torch {machine.torch}", f"CUDA {machine.cuda or 'none'}", f"Triton {machine.triton or 'none'}"]
    if machine.driver:
        parts.insert(2, f"driver {machine.driver}")
    lines.append(f"  {', '.join(parts)}, Python {machine.python}, {machine.system}")
    packages = [_package(machine, package) for package in machine.packages if package != "triton"]
    lines.append(f"  attention packages: {', '.join(packages) or 'none'}")
    lines.append(f"  Selected Mechanism: {_selected(machine, name)}")
    return lines
