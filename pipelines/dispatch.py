"""A back end of diffusers' `attention_dispatch`: processors that know back ends hand their calls to the router by it.

It is one more entry in diffusers' own table, there while a pipeline is patched, and does nothing unless it is chosen.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from ..attention.session import CURRENT
from .calls import PLACE, sdpa
from .process import kernels
from .ring import step

NAME = "attune"
_users: list[Any] = []  # what is there once for each pipeline that needs the entry


def _registry() -> Any:
    """diffusers' table of back ends; None where nobody has imported it, or this diffusers has none."""
    return sys.modules.get("diffusers.models.attention_dispatch")


def backend() -> Any:
    """Our member of AttentionBackendName, where it is registered; else None."""
    table = _registry()
    return None if table is None else table.AttentionBackendName._value2member_map_.get(NAME)


def register(user: Any) -> Any:
    """Add the back end, for `user`, and return its name as diffusers wants it; None where there are no back ends."""
    table = _registry()
    if table is None:
        return None
    names = table.AttentionBackendName
    if NAME not in names._value2member_map_:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        names._member_map_[NAME.upper()] = names._value2member_map_[NAME] = member
        names._member_names_.append(NAME.upper())
        options = {"supports_context_parallel": True} if hasattr(table, "_templated_context_parallel_attention") else {}
        registry = table._AttentionBackendRegistry
        # Functions differ: one that takes a _parallel_config must not stand where diffusers has none.
        registry.register(member, **options)(_parallel if options else _attend)
    if user not in _users:
        _users.append(user)
    return names._value2member_map_[NAME]


def unregister(user: Any) -> None:
    """`user` needs the back end no more; the last one takes it away."""
    if user in _users:
        _users.remove(user)
    member = backend()
    if _users or member is None:
        return
    table = _registry()
    names, registry = table.AttentionBackendName, table._AttentionBackendRegistry
    if registry._active_backend is member:  # somebody chose it by name meanwhile
        registry._active_backend = names.NATIVE
    names._member_names_.remove(NAME.upper())
    del names._member_map_[NAME.upper()], names._value2member_map_[NAME]
    for kept in (registry._backends, registry._constraints, registry._supported_arg_names):
        kept.pop(member, None)
    parallel = getattr(registry, "_supports_context_parallel", {})
    if isinstance(parallel, dict):  # as in diffusers' sources before 0.36
        parallel.pop(member, None)
    else:
        parallel.discard(NAME)


def _backend_before() -> Any:
    """The name of the back end that the processor would have used."""
    table, place = _registry(), PLACE.get() or {}
    name = place.get("backend") or table._AttentionBackendRegistry._active_backend
    return table.AttentionBackendName.NATIVE if name == NAME else table.AttentionBackendName(name)


def _earlier(arguments: dict[str, Any], parallel: Any = None) -> torch.Tensor:
    """The call by the back end that the processor would have used."""
    registry, name = _registry()._AttentionBackendRegistry, _backend_before()
    given = {**arguments, "_parallel_config": parallel}
    known = registry._supported_arg_names[name]
    out: torch.Tensor = registry._backends[name](**{key: value for key, value in given.items() if key in known})
    return out


def _earlier_step(
    ctx: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of a ring by that back end's own function for it: (output (B, N, H, D), log-sum-exp (B, N, H))."""
    table, name = _registry(), _backend_before()
    if name == table.AttentionBackendName.NATIVE and not dropout_p:
        # PyTorch's attention, which diffusers cannot ask for a log-sum-exp.
        load = kernels()["sdpa"].load_lse
        assert load is not None
        out, lse = load()(*(t.transpose(1, 2) for t in (query, key, value)), mask=mask, scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2)
    mentioned = table._AttentionBackendRegistry._backends[name].__code__.co_names
    step_of = next((getattr(table, word) for word in mentioned if word.endswith("_forward_op")), None)
    if step_of is None:
        raise ValueError(f"diffusers' back end {name.value} cannot compute ring attention")
    out, lse = step_of(ctx, query, key, value, mask, dropout_p, is_causal, scale, enable_gqa, True, **options)
    return out, lse.reshape(lse.shape[:3])  # some give it a fourth dimension, of one


def _in_four_dimensions(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """A (B, M) mask, which hides keys, as one that broadcasts; others as they are."""
    hides_keys = mask is not None and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1])
    return mask[:, None, None] if mask is not None and hides_keys else mask


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention of (B, N, H, D) tensors; the result has the same layout. A (B, M) mask hides keys."""
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if attn_mask is not None and not isinstance(attn_mask, torch.Tensor):  # a BlockMask: only flex reads it
        return _earlier(arguments)
    if not torch.compiler.is_compiling():
        forward = CURRENT.get()
        if forward is None or forward.router is None:
            return _earlier(arguments)
    mask = _in_four_dimensions(attn_mask, query, key)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    more = {"enable_gqa": True} if enable_gqa else {}
    out = sdpa(q, k, v, mask, dropout_p, is_causal, scale, host=lambda: _earlier(arguments).transpose(1, 2), **more)
    return out.transpose(1, 2)


def _forward_op(
    ctx: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Any:
    """One process's share of a call, for diffusers' templates of context parallelism; of a ring, one step of it."""
    if not return_lse:
        return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    mask = _in_four_dimensions(attn_mask, query, key)
    arguments = (query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
    out, lse = step(
        query,
        key,
        value,
        mask,
        dropout_p,
        scale,
        lambda: _earlier_step(ctx, *arguments, _save_ctx=_save_ctx, _parallel_config=_parallel_config),
    )
    return out, lse[..., None] if _wants_four_dimensions() else lse


@functools.cache
def _wants_four_dimensions() -> bool:
    """0.37 expects what cuDNN gives from torch 2.9 on, of every back end; others take three dimensions."""
    ring = _registry().TemplatedRingAttention.forward
    return "is_torch_version" in ring.__code__.co_names and torch.__version__ >= (2, 9)


def _no_backward(*_arguments: Any, **_more: Any) -> Any:
    raise NotImplementedError("attune is for inference: under context parallelism it has no backward pass")


def _parallel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """`_attend`, spread over processes where diffusers asks for it."""
    if _parallel_config is None:
        return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    forward = CURRENT.get()
    routed = forward is not None and forward.router is not None
    if torch.compiler.is_compiling():  # a graph has no place for the log-sum-exp of our kernels
        routed = _parallel_config.context_parallel_config.ring_degree == 1
    wants_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if return_lse or wants_gradient or not routed:
        arguments = {
            "query": query,
            "key": key,
            "value": value,
            "attn_mask": attn_mask,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
            "return_lse": return_lse,
        }
        return _earlier(arguments, _parallel_config)
    # Every process has to go this way: what one of them finds about a kernel must not change what is sent.
    out: torch.Tensor = _registry()._templated_context_parallel_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        return_lse,
        forward_op=_forward_op,
        backward_op=_no_backward,
        _parallel_config=_parallel_config,
    )
    return out
