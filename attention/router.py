"""The override that the host calls for every attention call of a model.

`Router.__call__` makes a small key of the call, looks its route up, sees the tensors in the kernel's layout and runs
the kernel. A new key is planned once per run. Everything that changes lives in `Session`, which belongs to one
sampling run: a router may be shared by threads, by cached nodes and by clones of a model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.compiler import is_compiling

from .check import Check
from .compiled import traced_attention
from .guard import Finding
from .kernel import Kernel
from .link import HostFunction, HostLink
from .machine import Machine
from .policy import Policy
from .routing import ABSENT, can_do_without, demote, new_route
from .session import BUSY, CURRENT, Forward, Session


def _given(options: Any, scale: Any, enable_gqa: Any, low_precision: Any, inside: Any) -> dict[str, Any]:
    """The keyword arguments as the host gave them."""
    given: dict[str, Any] = {}
    if options is not None:
        given["transformer_options"] = options
    if scale is not ABSENT:
        given["scale"] = scale
    if enable_gqa is not ABSENT:
        given["enable_gqa"] = enable_gqa
    if low_precision is not ABSENT:
        given["low_precision_attention"] = low_precision
    if inside is not ABSENT:
        given["_inside_attn_wrapper"] = inside
    return given


_BULK = 64  # calls outside any run that are judged together


class Router:
    """Sends each attention call of a model to the kernel that its policy and this machine agree on.

    `doubles` and `blocks` number the blocks of models that count two kinds of them (Flux): doubles first.
    """

    # No `container_function` here, on purpose: the host then takes the tensors out of their containers itself and
    # hands over its own function, which is what is needed to fall back.

    def __init__(
        self,
        policy: Policy,
        kernels: Mapping[str, Kernel],
        machine: Machine,
        link: HostLink | None = None,
        doubles: int = 0,
        blocks: int | None = None,
    ) -> None:
        self.policy = policy
        self.kernels = kernels
        self.machine = machine
        self.link = link or HostLink()
        self.doubles = doubles
        self.blocks = blocks
        # For calls outside any run: rules by percent cannot hold, as nobody tells the noise level.
        self.idle_session = Session(self, endless=True)
        # Nobody could repeat anything later: such calls are judged on the spot, and with time in bulk.
        check = Check(self.idle_session.sampler, _BULK)
        self._idle = Forward(self, self.idle_session, policy.without_percent, guard=check)

    def flush_idle(self) -> None:
        """Bring the record of `idle_session` up to date."""
        self._idle.flush()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Router:
        return self  # old hosts deep-copy model options; the router must stay the one its wrappers know

    def __call__(
        self,
        func: HostFunction,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        transformer_options: Mapping[str, Any] | None = None,
        scale: Any = ABSENT,
        enable_gqa: Any = ABSENT,
        low_precision_attention: Any = ABSENT,
        _inside_attn_wrapper: Any = ABSENT,
        **unknown: Any,
    ) -> torch.Tensor:
        """The host's override protocol: `func` is the host's own attention, the rest are its arguments.

        Tensors are (B, N, H·D), or (B, H, N, D) with `skip_reshape`; returns (B, N, H·D), or (B, H, N, D) with
        `skip_output_reshape`, in q's dtype. Containers of tensors are emptied.
        """
        if is_compiling():
            known = _given(transformer_options, scale, enable_gqa, low_precision_attention, _inside_attn_wrapper)
            return traced_attention(
                func, q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **known, **unknown
            )
        forward = CURRENT.get()
        if forward is None or forward.router is not self:
            forward = self._idle
        block = None
        if transformer_options:
            block = transformer_options.get("transformer_index")
            if block is None:
                block = transformer_options.get("block_index")
                if self.doubles and block is not None and transformer_options.get("block_type") == "single":
                    block += self.doubles
        try:
            key = (
                q.shape,
                k.shape,
                v.shape,
                q.dtype,
                k.dtype,
                v.dtype,
                q.device,
                heads,
                mask if mask is None else (mask.shape, mask.dtype),
                attn_precision,
                skip_reshape,
                skip_output_reshape,
                scale,
                block,
                enable_gqa,
                low_precision_attention,
                tuple(unknown) if unknown else None,
                torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
            )
        except AttributeError:
            known = _given(transformer_options, scale, enable_gqa, low_precision_attention, _inside_attn_wrapper)
            attend = self.link.plain(func)  # something that is no tensor: the host knows what it is, or complains
            if not isinstance(q, torch.Tensor) and hasattr(q, "take"):
                # One-slot containers of newer hosts, met where the host did not unpack them.
                q, k, v, attend = q.take(), k.take(), v.take(), self.bound(func)
            return attend(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **known, **unknown)
        route = forward.routes.get(key)
        if route is None:
            route = new_route(self, forward, key, q, k, v, mask, transformer_options)
        while route.run is not None:
            failure: Exception | Finding | None
            timed = forward.turn.begin(route, q, k, v, mask) if route.trial and forward.turn else None
            try:
                mark = forward.clock.start(q.device) if forward.clock else None
                out = route.attend(q, k, v, mask)
                if forward.clock:
                    forward.clock.stop(mark, route.name)
            except Exception as error:
                if isinstance(error, self.link.interrupts) or not can_do_without(self, route, error):
                    raise
                failure = error.with_traceback(None)  # its frames hold the kernel's tensors
            else:
                if timed:
                    timed.end(q, k, v, mask, out)
                failure = forward.guard.see(route, q, k, v, mask, out) if route.guarded and forward.guard else None
                if failure is None:
                    forward.counts[route] += 1
                    return out
                del out
            demote(self, forward, key, route, failure)
            route = new_route(self, forward, key, q, k, v, mask, transformer_options)
        known = _given(transformer_options, scale, enable_gqa, low_precision_attention, _inside_attn_wrapper)
        timed = forward.turn.begin(route, q, k, v, mask) if route.trial and forward.turn else None
        token = CURRENT.set(BUSY)  # whatever the host calls inside is its own business
        mark = forward.clock.start(q.device) if forward.clock else None
        try:
            out = self.link.plain(func)(
                q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **known, **unknown
            )
        finally:
            CURRENT.reset(token)
        if forward.clock:
            forward.clock.stop(mark, route.name)
        if timed:
            timed.end(q, k, v, mask, out)
        if route.guarded and forward.guard and (failure := forward.guard.see(route, q, k, v, mask, out)):
            demote(self, forward, key, route, failure)
            if new_route(self, forward, key, q, k, v, mask, transformer_options).run is not None:
                return self.route(
                    func, q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **known, **unknown
                )
        forward.counts[route] += 1
        return out

    # The same function; a ChainedRouter replaces the other name. For calls that have passed an earlier override, or
    # carry no options.
    route = __call__

    def bound(self, func: HostFunction) -> HostFunction:
        """`route` as a function with the host's own signature."""
        return functools.partial(self.route, func)
