"""The override that the host calls for every attention call of a model.

`Router.__call__` makes a small key of the call, looks its route up, sees the tensors in the kernel's layout and runs
the kernel. A new key is planned once per run. Everything that changes lives in `Session`, which belongs to one
sampling run: a router may be shared by threads, by cached nodes and by clones of a model.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.compiler import is_compiling

from .call import Undescribable, describe
from .compiled import traced_attention
from .kernel import Kernel, reasons_against
from .link import HostFunction, HostLink, is_out_of_memory
from .machine import Machine
from .plan import HOST, Decision, Plan, make_plan
from .policy import Policy
from .session import CURRENT, Forward, Route, Session

log = logging.getLogger("attune")
_MOST_ROUTES = 4096  # per phase of a run; with more different calls than that, planning starts anew
_OUT_OF_MEMORY = "ran out of memory"
# Some of the host's functions read a keyword that is there and None as another thing than one that is not there.
_ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()


def _given(options: Any, scale: Any, enable_gqa: Any, low_precision: Any, inside: Any) -> dict[str, Any]:
    """The keyword arguments as the host gave them."""
    given: dict[str, Any] = {}
    if options is not None:
        given["transformer_options"] = options
    if scale is not _ABSENT:
        given["scale"] = scale
    if enable_gqa is not _ABSENT:
        given["enable_gqa"] = enable_gqa
    if low_precision is not _ABSENT:
        given["low_precision_attention"] = low_precision
    if inside is not _ABSENT:
        given["_inside_attn_wrapper"] = inside
    return given


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
        self.idle_session = Session(self)
        self._idle = Forward(self, self.idle_session, policy.without_percent)

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
        scale: Any = _ABSENT,
        enable_gqa: Any = _ABSENT,
        low_precision_attention: Any = _ABSENT,
        _inside_attn_wrapper: Any = _ABSENT,
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
            )
        except AttributeError:
            if not hasattr(q, "take"):
                raise
            # One-slot containers of newer hosts, met where the host did not unpack them.
            q, k, v = q.take(), k.take(), v.take()  # type: ignore[call-arg]
            known = _given(transformer_options, scale, enable_gqa, low_precision_attention, _inside_attn_wrapper)
            return self.route(
                func, q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **known, **unknown
            )
        route = forward.routes.get(key)
        if route is None:
            route = self._plan(forward, key, q, k, v, mask, transformer_options)
        while route.run is not None:
            try:
                out = route.attend(q, k, v, mask)
            except Exception as error:
                self._demote(forward, key, route, error)
                route = self._plan(forward, key, q, k, v, mask, transformer_options)
            else:
                forward.counts[route] += 1
                return out
        known = _given(transformer_options, scale, enable_gqa, low_precision_attention, _inside_attn_wrapper)
        token = CURRENT.set(None)  # whatever the host calls inside is its own business
        try:
            out = self.link.plain(func)(
                q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **known, **unknown
            )
        finally:
            CURRENT.reset(token)
        forward.counts[route] += 1
        return out

    # The same without any earlier override in front: for calls that have passed it, or carry no options.
    route = __call__

    def bound(self, func: HostFunction) -> HostFunction:
        """`route` as a function with the host's own signature."""
        return functools.partial(self.route, func)

    def _demote(self, forward: Forward, key: Any, route: Route, error: Exception) -> None:
        """A kernel raised: never use it again for this call in this run, and say so once. Re-raises interrupts."""
        if isinstance(error, self.link.interrupts) or route.kernel is None:
            raise error
        name = route.kernel.name
        if is_out_of_memory(error):
            if name == "split" or "split" not in self.kernels:
                raise error
            self.link.free_memory()
            reason = f"{_OUT_OF_MEMORY}: {_one_line(error)}"
        else:
            reason = f"raised {type(error).__name__}: {_one_line(error)}"
        forward.session.demote(key, name, reason)
        if forward.session.record.note(f"{name} {reason}"):
            log.warning(
                "Attention kernel %s %s. Another kernel computes these calls for the rest of the run.", name, reason
            )

    def _plan(
        self,
        forward: Forward,
        key: tuple[Any, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any] | None,
    ) -> Route:
        heads, _, precision, skip_reshape, skip_output, scale, block, gqa, low_precision, names = key[7:]
        unknown = names or ()
        if scale is _ABSENT:
            scale = None
        if scale is not None and not isinstance(scale, (int, float)):
            unknown += (f"scale of type {type(scale).__name__}",)
        try:
            call = describe(
                q,
                k,
                v,
                heads,
                mask=mask,
                skip_reshape=skip_reshape,
                scale=scale,
                enable_gqa=gqa is not _ABSENT and bool(gqa),
                fp32_scores=precision is torch.float32,
                lossy_allowed=low_precision is not False,
                block=block,
                blocks=self.blocks or (options or {}).get("total_blocks"),
                unknown=unknown,
            )
        except Undescribable as why:
            route = Route((Decision(HOST, HOST, "", ()),))
            forward.session.record.note(f"the host's own attention runs where {why}")
        else:
            if call.kind == "self":
                record = forward.session.record
                record.longest_self = max(record.longest_self, call.q_len)
            route = self._ready(forward, key, call)
            if route.run is not None:
                route.scale = scale
                route.fit(call, (q.ndim, k.ndim, v.ndim), skip_reshape, skip_output)
                if call.mixed_dtypes:
                    route.dtype = call.dtype
                    route.out_dtype = q.dtype
        if len(forward.routes) >= _MOST_ROUTES:
            forward.routes.clear()
        forward.routes[key] = route
        return route

    def _ready(self, forward: Forward, key: Any, call: Any) -> Route:
        """Plan, and load what was planned; a kernel that cannot even be loaded is demoted like one that raises."""
        rules = [rule for index, rule in enumerate(self.policy.rules) if index in forward.active]
        while True:
            demoted = forward.session.demoted(key)
            plan: Plan = make_plan(call, rules, self.kernels, self.machine, demoted, self.link.free_bytes(call.device))
            kernel, trail = plan.kernel, plan.decisions
            if any(_OUT_OF_MEMORY in reason for reason in demoted.values()):
                # What did not fit is done again by the exact kernel that needs least, whatever the rules prefer.
                split = self.kernels["split"]
                if not reasons_against(split, call, self.machine):
                    kernel = split
                    trail = (*(d for d in trail if not d.accepted), Decision("split", "split", ""))
            if kernel is None:
                return Route(trail)
            route = Route(trail, kernel)
            try:
                route.run = kernel.load()
            except Exception as error:
                self._demote(forward, key, route, error)
                continue
            return route


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"
