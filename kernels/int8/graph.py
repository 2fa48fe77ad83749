"""The kernels under torch.compile: one operator each, which a graph holds as a whole.

The router has an operator of its own (attention/compiled.py), so this is for who calls a kernel in a graph directly.
"""

from __future__ import annotations

import functools
import hashlib
import threading

import torch

from ...attention.kernel import Run
from . import launch

# The namespace is this module's own: two copies of the pack in one process must not define one operator twice.
_NAMESPACE = "attune_" + hashlib.sha256(__name__.encode()).hexdigest()[:16]
_LOCK = threading.Lock()
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")
_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale) -> Tensor"


def _fake(
    q: torch.Tensor, _k: torch.Tensor, _v: torch.Tensor, _mask: torch.Tensor | None, _scale: float | None
) -> torch.Tensor:
    return q.new_empty(q.shape)


def runner(name: str) -> Run:
    """`int8_attention` or `exact_attention` of launch.py: itself, and inside a graph that is traced its operator."""
    with _LOCK:  # the operator can be defined once only
        return _runner(name)


@functools.cache
def _runner(name: str) -> Run:
    attend = getattr(launch, name)

    def direct(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        # Triton launches on the current GPU. Entering a context costs microseconds, so only where it is another one.
        if not q.is_cuda or q.get_device() == torch.cuda.current_device():
            return attend(q, k, v, mask=mask, scale=scale)  # type: ignore[no-any-return]
        with torch.cuda.device(q.device):
            return attend(q, k, v, mask=mask, scale=scale)  # type: ignore[no-any-return]

    def opaque(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        return direct(q, k, v, mask=mask, scale=scale)

    _LIBRARY.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, opaque, "CompositeExplicitAutograd")
    # Not by register_fake(): that one looks through the sources of every loaded module.
    _LIBRARY.impl(name, _fake, "Meta")
    operator = getattr(getattr(torch.ops, _NAMESPACE), name).default

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        # Outside of a graph the operator would cost microseconds for nothing.
        if torch.compiler.is_compiling():
            return operator(q, k, v, mask, scale)  # type: ignore[no-any-return]
        return direct(q, k, v, mask=mask, scale=scale)

    return run
