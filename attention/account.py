"""The record of a run as plain data: what is kept on disk, and what reports are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from .entries import Sampled
from .policy import BlockRange, Rule
from .record import Record

_MOST_PLANS = 500


def _blocks_in_words(blocks: BlockRange) -> str:
    if blocks.last < 0 or blocks.first < 0:
        if blocks.last == -1:
            return f"the last {-blocks.first} blocks" if blocks.first < -1 else "the last block"
        return f"blocks {blocks.first} to {blocks.last} (negative: from the end)"
    return f"block {blocks.first}" if blocks.first == blocks.last else f"blocks {blocks.first}-{blocks.last}"


def words(rule: Rule) -> str:
    """A rule as a user would say it."""
    names = " or ".join(rule.kernels)
    parts = [f"only exact kernels, at last {names}" if rule.exact_only else names]
    if rule.kind:
        parts.append(f"for {rule.kind} attention")
    if rule.blocks is not None:
        parts.append(f"in {_blocks_in_words(rule.blocks)}")
    if not rule.always:
        parts.append(f"from {rule.from_percent:g} to {rule.to_percent:g} percent")
    if rule.min_tokens:
        parts.append(f"for {rule.min_tokens:,} tokens or more")
    if rule.on_refusal == "error":
        parts.append("or stop")
    return " ".join(parts)


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "node": rule.source,
        "words": words(rule),
        "kernels": list(rule.kernels),
        "from_percent": rule.from_percent,
        "to_percent": rule.to_percent,
        "blocks": [rule.blocks.first, rule.blocks.last] if rule.blocks else None,
        "kind": rule.kind,
        "min_tokens": rule.min_tokens,
        "on_refusal": rule.on_refusal,
        "exact_only": rule.exact_only,
        "error_budget": rule.error_budget,
    }


def _ranges(blocks: Iterable[int | None]) -> list[list[int]]:
    """Sorted block numbers as [first, last] pairs; unknown ones (None) are left out."""
    found: list[list[int]] = []
    for block in sorted({block for block in blocks if block is not None}):
        if found and found[-1][1] == block - 1:
            found[-1][1] = block
        else:
            found.append([block, block])
    return found


def _plans(record: Record) -> list[dict[str, Any]]:
    """Each way in which a plan came about, most calls first: requested, planned, observed, and every refusal."""
    rows: dict[Any, dict[str, Any]] = {}
    places: dict[Any, set[int | None]] = {}
    for (trail, block, kind), count in record.calls().items():
        row = rows.get(trail)
        if row is None:
            row = rows[trail] = {
                "requested": trail[0].requested,
                "node": trail[0].source,
                "planned": record.planned(trail),
                "observed": trail[-1].kernel,
                "calls": 0,
                "discarded": 0,
                "planned_calls": 0,
                "blocks": [],
                "kinds": [],
                "first_step": record.history.step_of_forward(count.forward),
                "refused": [
                    {"kernel": one.kernel, "requested": one.requested, "node": one.source, "reasons": list(one.reasons)}
                    for one in trail
                    if not one.accepted
                ],
            }
            places[trail] = set()
        row["calls"] += count.kept
        row["discarded"] += count.discarded
        row["planned_calls"] += count.first
        places[trail].add(block)
        if kind not in row["kinds"]:
            row["kinds"].append(kind)
    for trail, row in rows.items():
        row["blocks"] = _ranges(places[trail])
    return sorted(rows.values(), key=lambda row: -row["calls"])


def _error(sampled: Sampled | None) -> dict[str, Any] | None:
    if sampled is None:
        return None
    by_block = sorted(sampled.by_block.items(), key=lambda item: (item[0] is None, item[0] or 0))
    known = bool(sampled.calls)
    return {
        "samples": sampled.calls,
        "unusable": sampled.unusable,
        "mean_l1": sampled.l1 if known else None,
        "largest_l1": sampled.largest_l1 if known else None,
        "mean_l2": sampled.l2 if known else None,
        "largest_l2": sampled.largest_l2 if known else None,
        "largest_l1_by_block": [[block, error] for block, error in by_block],
    }


def _kernels(record: Record) -> dict[str, dict[str, Any]]:
    kept: Counter[str] = Counter()
    discarded: Counter[str] = Counter()
    for (trail, _, _), count in record.calls().items():
        kept[trail[-1].kernel] += count.kept
        discarded[trail[-1].kernel] += count.discarded
    in_all = sum(time.seconds for time in record.times.values())
    found = {}
    for name in sorted({**kept, **record.times, **record.errors}, key=lambda name: (-kept[name], name)):
        time = record.times.get(name)
        found[name] = {
            "calls": kept[name],
            "discarded": discarded[name],
            "timed_calls": time.calls if time else 0,
            "seconds": time.seconds if time else None,
            "share": time.seconds / in_all if time and in_all > 0 else None,
            "error": _error(record.errors.get(name)),
        }
    return found


def account(record: Record) -> dict[str, Any]:
    """The record of a closed run, for JSON.

    `patterns` holds what forwards did, as rows [block, kind, kernel, calls]; each of `steps` says how many times it
    had which pattern: [number of the pattern, times]. Counts are of calls whose result was used, but for what is
    called discarded. `requested` and `planned` count each of them once, as it was before anything was done again.
    """
    history, plans = record.history, _plans(record)
    requested: Counter[str] = Counter()
    planned: Counter[str] = Counter()
    for row in plans:
        requested[row["requested"]] += row["planned_calls"]
        planned[row["planned"]] += row["planned_calls"]
    events = [
        {
            "kind": what.kind,
            "text": what.text,
            "kernel": what.kernel,
            "block": what.block,
            "call_kind": what.call_kind,
            "reason": what.reason,
            "count": seen.count,
            "forward": seen.forward,
            "step": history.step_of_forward(seen.forward),
        }
        for what, seen in record.happened().items()
    ]
    steps = [
        {
            "step": step.number,
            "sigma": step.sigma,
            "forwards": step.forwards,
            "patterns": [list(item) for item in step.kept.items()],
            "discarded": [list(item) for item in step.discarded.items()],
        }
        for step in history.steps
    ]
    return {
        "policy": [_rule(rule) for rule in record.policy.rules],
        "blocks": record.blocks,
        "doubles": record.doubles,
        "tokens": record.longest_self,
        "forwards": record.forwards,
        "repeated": record.repeated,
        "shadowed": record.shadowed,
        "measuring_seconds": record.measuring,
        "requested": dict(+requested),
        "planned": dict(+planned),
        "observed": dict(record.observed()),
        "kernels": _kernels(record),
        "timed": record.clock is not None,
        "untimed": record.clock.untimed if record.clock else 0,
        "plans": plans[:_MOST_PLANS],
        "plans_left_out": max(0, len(plans) - _MOST_PLANS),
        "patterns": [[[*cell, count] for cell, count in pattern] for pattern in history.patterns],
        "steps": steps,
        "forwards_left_out": history.left_out,
        "events": events,
        "events_left_out": record.unlisted,
        "notes": record.notes,
    }
