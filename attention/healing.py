"""Run a forward pass so that a kernel's bad output never reaches the picture: watch it, and repeat it if need be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from .check import Check
from .guard import NOT_FINITE, Finding, Place, Watch
from .plan import PLAIN_HOSTS
from .policy import Rule
from .router import Router
from .routing import blame
from .session import Forward, Session
from .trial import Turn

log = logging.getLogger("attune")
_RIDDLES = 2  # forwards with NaN and no culprit, after which every kernel that took part has to go


class Snapshot:
    """What containers held before a forward: some of it consumes its lists, or moves a pointer in them.

    Dictionaries, lists and sets are followed, through tuples too; tensors and other objects are left alone. A UNet pops
    its ControlNet's lists empty, and Wan's autoregressive cache counts up in a dictionary.
    """

    def __init__(self, *roots: Any) -> None:
        self.roots = roots
        self._kept: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        waiting: list[Any] = list(roots)
        while waiting:
            value = waiting.pop()
            if not isinstance(value, (dict, list, set, tuple)) or id(value) in seen:
                continue
            seen.add(id(value))
            if not isinstance(value, tuple):
                self._kept.append((value, value.copy()))
            if not isinstance(value, set):
                waiting.extend(value.values() if isinstance(value, dict) else value)

    def restore(self) -> None:
        """Put everything back, in place."""
        for container, before in self._kept:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)


def _safe_rules(router: Router) -> tuple[Rule, ...]:
    """What a repeated forward runs on: the host's own attention, where that is plain."""
    return () if router.machine.host_attention in PLAIN_HOSTS else (Rule(("sdpa",)),)


def healed(
    router: Router,
    session: Session,
    active: frozenset[int],
    takes_bare_calls: bool,
    run: Callable[[], Any],
    snapshot: Snapshot,
    sigma: torch.Tensor | None = None,
) -> Any:
    """What `run` (one forward pass) returns; run again where a kernel's output was not finite, or too far off.

    The repeat is on the host's own attention, and its result is used if it is finite. Then the forward is done once
    more, each call judged at once, to find the culprit: it is not used again for such calls. If the repeat is no
    better, attention was not the cause: the first result is returned and nothing is changed. Interrupts go through.
    """
    record = session.record

    def forward(guard: Watch | Check, rules: tuple[Rule, ...] | None = None, turn: Turn | None = None) -> Forward:
        return Forward(
            router, session, active, takes_bare_calls, guard=guard, rules=rules, sigma=sigma, held=True, turn=turn
        )

    watch, turn = Watch(session.sampler), session.tuner.turn()
    with forward(watch, turn=turn) as first:
        out = run()
        health = watch.read(out)
    if turn is not None and session.tuner.end(turn, health.good):
        session.plan_anew()
    for sample in health.samples:
        record.sampled(sample.route.name, sample.l1, sample.l2, sample.route.call.block if sample.route.call else None)
    if health.good or session.beyond_help:
        first.flush(forwards=0 if first.inside else 1)
        return out
    guilty = [sample for sample in health.samples if sample.beyond]
    for sample in guilty:
        if sample.route.call is not None:
            blame(router, first, Finding(sample.route.name, Place.of(sample.route.call), sample.beyond))
    if guilty:
        session.sampler.begin_anew()
    names = ", ".join(watch.kernels)
    reason = guilty[0].beyond if health.finite else f"{names} {NOT_FINITE}"
    repeated, left = "a forward was repeated on the host's own attention", Snapshot(*snapshot.roots)
    snapshot.restore()
    again = Watch(session.sampler)
    try:
        with forward(again, _safe_rules(router)) as second:
            clean = run()
            better = again.read(clean).finite
    except router.link.interrupts:  # stopped: what was seen so far is kept
        record.event("repeat", repeated, reason=reason)
        first.flush(discarded=True)
        raise
    except Exception as error:  # too little memory, most likely: the first result is what there is
        left.restore()
        _say_not_repeated(session, reason, error.with_traceback(None))
        first.flush(forwards=1)
        return out
    if not better:
        if not health.finite:
            session.beyond_help = True
            _say_beyond_help(session)
        first.flush(forwards=1)
        return out
    try:
        record.event("repeat", repeated, reason=reason)
        if not health.finite:
            after = Snapshot(*snapshot.roots)
            snapshot.restore()
            check = Check(session.sampler)
            _look_for_culprit(router, forward(check), run)
            after.restore()  # as the clean forward left it
            if not check.findings:
                _riddle(session, names, tuple(watch.kernels))
    finally:  # only now, so that what was found is told of this forward and not of the next
        first.flush(discarded=True)
        second.flush(forwards=1)
    return clean


def _look_for_culprit(router: Router, checked: Forward, run: Callable[[], Any]) -> None:
    """The forward once more, for what its guard finds; nobody needs its result, and it counts for nothing."""
    checked.inside = True
    with checked:
        try:
            run()
        except Exception as error:
            checked.counts.clear()
            if isinstance(error, router.link.interrupts):
                raise
            log.warning("Attention: the forward that looks for the culprit failed: %s", error)


def _say_not_repeated(session: Session, reason: str, error: Exception) -> None:
    text = (
        f"a forward should have been repeated ({reason}), and that failed: {type(error).__name__}: {error}. Its first "
        "result was kept. If the picture is broken, choose another kernel, or a smaller size if memory ran out"
    )
    session.record.event("fallback", text, reason=reason)
    if session.record.note(text):
        log.warning("Attention: %s", text)


def _say_beyond_help(session: Session) -> None:
    text = (
        "the model's numbers are not finite, and the host's own attention does not change that: attention is not the "
        "cause. Nothing was changed. Look at the model's precision (fp16 may overflow), its VAE, LoRAs and the inputs."
    )
    session.record.event("not attention", text)
    if session.record.note(text):
        log.warning("Attention: %s", text)


def _riddle(session: Session, names: str, kernels: tuple[str, ...]) -> None:
    """NaN came, and did not come again when it was looked for."""
    session.riddles += 1
    text = f"{names} {NOT_FINITE}, which did not happen again when the call was looked for; the forward was repeated"
    if session.riddles < _RIDDLES:
        session.record.event("fallback", text, reason=NOT_FINITE)
    else:
        text += f"; after {session.riddles} times it is not used any more in this run"
        reason = f"{NOT_FINITE} {session.riddles} times in this run, in calls that could not be found"
        for kernel in kernels:
            session.ban(kernel, reason)
            session.record.event("demotion", text, kernel=kernel, reason=reason)
    if session.record.note(text):
        log.warning("Attention: %s.", text)
