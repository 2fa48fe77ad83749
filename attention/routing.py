"""The slow path of the router: what happens when a call is new, or its kernel has failed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .call import AttentionCall, Undescribable, describe
from .guard import Finding, Limit
from .kernel import Kernel, reasons_against
from .link import is_out_of_memory
from .plan import HOST, PLAIN_HOSTS, Decision, RefusedError, make_plan
from .policy import Rule
from .route import Route
from .session import Forward

if TYPE_CHECKING:
    from .router import Router

log = logging.getLogger("attune")
# Some of the host's functions read a keyword that is there and None as another thing than one that is not there.
ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()
_MOST_ROUTES = 4096  # per phase of a run; with more different calls than that, planning starts anew
_BLOCK = 13  # where the block stands in a call's key
_OUT_OF_MEMORY = "ran out of memory"


def _without_block(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a failure holds for: a kernel that fails in one block fails in all that look alike."""
    return key[:_BLOCK] + key[_BLOCK + 1 :]


def can_do_without(router: Router, route: Route, error: Exception) -> bool:
    """May another kernel take over? Not where memory ran out in the kernel that needs least of it."""
    name = route.kernel.name if route.kernel else ""
    return not is_out_of_memory(error) or (name != "split" and "split" in router.kernels)


def demote(router: Router, forward: Forward, key: tuple[Any, ...], route: Route, error: Exception | Finding) -> None:
    """A kernel raised, or its output was no good: never use it again for such calls in this run, and say so once."""
    if isinstance(error, Finding):
        blame(router, forward, error)
        return
    assert route.kernel is not None
    name, kind = route.kernel.name, type(error).__name__
    text = " ".join(str(error).split())[:300] or "no message"
    if is_out_of_memory(error):
        router.link.free_memory()
        reason = f"{_OUT_OF_MEMORY}: {text}"
    else:
        reason = f"raised {kind}: {text}"
    forward.session.demote(_without_block(key), name, reason)
    call = route.call
    if call is not None:
        forward.session.tuner.failed(call, name, reason)
    forward.session.record.event(
        "demotion",
        f"{name} {reason}",
        kernel=name,
        block=call.block if call else None,
        call_kind=call.kind if call else "",
        reason=reason,
    )
    if forward.session.first_time((name, kind)):
        forward.session.record.note(f"{name} {reason}")
        log.warning("Attention kernel %s %s. Another kernel computes such calls for the rest of the run.", name, reason)


def blame(router: Router, forward: Forward, finding: Finding) -> None:
    """A kernel's output was no good: never use it again for such calls in this run, and say so once."""
    session = forward.session
    session.blame(finding)
    text, place = f"{finding.kernel} {finding.reason} in {finding.place}", finding.place
    session.record.event(
        "demotion", text, kernel=finding.kernel, block=place.block, call_kind=place.kind, reason=finding.reason
    )
    if session.first_time((finding.kernel, "no good")):
        session.record.note(f"{text}; another kernel computes such calls for the rest of the run")
        log.warning("Attention kernel %s. Another kernel computes such calls for the rest of the run.", text)


def new_route(
    router: Router,
    forward: Forward,
    key: tuple[Any, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    options: Mapping[str, Any] | None,
) -> Route:
    """Describe and plan a call that is new, make its kernel ready and remember it. Raises RefusedError."""
    heads, _, precision, skip_reshape, skip_output, scale, block, gqa, low_precision, names, gradient = key[7:]
    if forward.rules is None:
        rules = [rule for index, rule in enumerate(router.policy.rules) if index in forward.active]
    else:
        rules = list(forward.rules)
    unknown = names or ()
    if scale is ABSENT:
        scale = None
    keep = scale is None or isinstance(scale, (int, float))  # a tensor in a key would be kept alive, and never found
    if not keep:
        unknown += (f"scale of type {type(scale).__name__}",)
    try:
        call = describe(
            q,
            k,
            v,
            heads,
            mask=mask,
            skip_reshape=skip_reshape,
            scale=scale if keep else None,
            enable_gqa=gqa is not ABSENT and bool(gqa),
            fp32_scores=precision is torch.float32,
            lossy_allowed=low_precision is not False,
            block=block,
            blocks=router.blocks or (options or {}).get("total_blocks"),
            gradient=gradient,
            unknown=unknown,
        )
    except Undescribable as why:
        route = Route(_undescribed(rules, str(why)))
        route.guarded = forward.rules is not None
    else:
        _look_at(forward, call, rules)
        route = _ready(router, forward, key, call, rules)
        route.call = call
        route.scale = scale
        route.skips = (skip_reshape, skip_output)
        route.trial = forward.session.tuner.trial(call, route.trail[-1])
        # The host's own attention is watched where it is another package's, or where nothing else could be.
        route.guarded = forward.rules is not None or router.machine.host_attention not in PLAIN_HOSTS
        if route.kernel is not None:
            route.guarded = forward.rules is not None or route.kernel.needs_proof or not route.kernel.exact
            route.limit = _limit(route, route.kernel, rules)
            route.compared = forward.session.sampler.knows(route)
            route.fit(call, q, k, v)
    if len(forward.routes) >= _MOST_ROUTES:
        forward.flush()
        forward.routes.clear()
    if keep:
        forward.routes[key] = route
    return route


def _undescribed(rules: list[Rule], why: str) -> tuple[Decision, ...]:
    """The trail of a call that only the host may try. Raises RefusedError where a rule may not fall through."""
    trail: list[Decision] = []
    for rule in reversed(rules):
        refused = [Decision(name, name, rule.source, (why,)) for name in rule.kernels]
        if rule.on_refusal == "error":
            raise RefusedError(refused)
        trail += refused
    return (*trail, Decision(HOST, HOST, ""))


def _look_at(forward: Forward, call: AttentionCall, rules: list[Rule]) -> None:
    """What a run has to know about its calls: how long they get, and whether block ranges can mean anything."""
    record = forward.session.record
    if call.kind == "self":
        record.longest_self = max(record.longest_self, call.q_len)
    if any(rule.blocks is not None and rule.blocks.unknown_to(call) for rule in rules):
        record.note(
            "this model does not tell the number of its blocks: rules for some of them do nothing here, and parts that "
            "were to stay exact are exact in every block"
        )


def _limit(route: Route, kernel: Kernel, rules: list[Rule]) -> Limit | None:
    """How far a lossy kernel may be from float32: its own word where the user named it, else the rule's budget."""
    if kernel.exact or route.call is None:
        return None
    accepted = route.trail[-1]
    if accepted.requested in ("auto", "auto_fast"):
        budgets = [rule.error_budget for rule in rules if rule.source == accepted.source]
        return Limit("l1", min(budgets))
    return Limit("l2", kernel.tolerance[route.call.dtype])


def _ready(router: Router, forward: Forward, key: tuple[Any, ...], call: AttentionCall, rules: list[Rule]) -> Route:
    """Plan, and load what was planned; a kernel that cannot even be loaded is demoted like one that raises."""
    while True:
        demoted = forward.session.demoted(_without_block(key))
        unfit = {**forward.session.refused(call.device), **demoted, **forward.session.unfit(call)}
        free_bytes, prefer = router.link.free_bytes(call.device), forward.session.tuner.prefer
        plan = make_plan(call, rules, router.kernels, router.machine, unfit, free_bytes, prefer)
        kernel, trail = plan.kernel, plan.decisions
        if any(_OUT_OF_MEMORY in reason for reason in demoted.values()):
            # What did not fit is done again by the exact kernel that needs least, whatever the rules prefer.
            split = router.kernels.get("split")
            if split and "split" not in unfit and not reasons_against(split, call, router.machine):
                kernel = split
                trail = (*(d for d in trail if not d.accepted), Decision("split", "split", ""))
        if kernel is None:
            return Route(trail)
        route = Route(trail, kernel)
        try:
            route.run = kernel.load()
        except Exception as error:
            if isinstance(error, router.link.interrupts) or not can_do_without(router, route, error):
                raise
            demote(router, forward, key, route, error)
            continue
        return route
