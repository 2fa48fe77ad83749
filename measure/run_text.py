"""A run that was recorded, as text. What a run's data holds: attention/account.py, host/runs.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .run_cells import in_ranges, kernel_summary, phases, title

KIND = "attune run"
SCHEMA = 1
HOW_TO_TIME = "switch on time_calls on the Attention Selector"
_HOW_TO_TIME_A_PIPELINE = "give attune.apply a Rule with timed=True"
_MOST = 12  # lines of one list
_NEEDED = (
    "status", "model", "machine", "stage", "observed", "kernels", "plans", "patterns", "steps", "events", "notes",
)  # fmt: skip


class NotARunError(ValueError):
    """A file that holds no record of a run that this version can read."""


def read_run(path: Path) -> dict[str, Any]:
    """The run that is kept in a file. Raises NotARunError, or OSError where it cannot be read at all."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise NotARunError(f"{path} is no record of a run: it holds no JSON ({error})") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise NotARunError(f"{path} is no record of a run: wanted kind {KIND!r}, found {found!r}")
    if data.get("schema") != SCHEMA:
        raise NotARunError(
            f"{path} was written by another version of ComfyUI-Attune: wanted schema {SCHEMA}, "
            f"found {data.get('schema')!r}"
        )
    missing = [key for key in _NEEDED if key not in data]
    if missing:
        raise NotARunError(f"{path} is no whole record of a run: {', '.join(missing)} is missing")
    return data


def device_line(run: dict[str, Any]) -> str:
    machine = run["machine"]
    devices = ", ".join(one["title"] if one["name"] != "cpu" else "CPU" for one in machine["devices"])
    whose = "the pipeline's" if _of_a_pipeline(run) else "ComfyUI's"
    own = f"{whose} own attention: {machine['host_attention']}" if machine["host_attention"] else ""
    return ", ".join(part for part in (devices, f"torch {machine['torch']}", own) if part)


def error_text(error: dict[str, Any] | None) -> str:
    """Mean and largest error of a kernel, relative L1."""
    if not error or not error["samples"]:
        return ""
    return f"{error['mean_l1']:.2g} / {error['largest_l1']:.2g}"


def share_text(kernel: dict[str, Any]) -> str:
    return "" if kernel["share"] is None else percent(kernel["share"])


def percent(share: float) -> str:
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


_SAID = {"demotion": "given up", "repeat": "repeated", "fallback": "fell back"}  # as the panel says it


def events_text(run: dict[str, Any]) -> list[str]:
    """What did not go as planned, a line each: what, where first, how often. What differs by the place only is one."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for event in run["events"]:
        alike = event["reason"] if event["kernel"] and event["reason"] else event["text"]
        groups.setdefault((event["kind"], event["kernel"], alike), []).append(event)
    lines = []
    for events in groups.values():
        first = events[0]
        alone = len(events) == 1 or not (first["kernel"] and first["reason"])
        said = first["text"] if alone else f"{first['kernel']} {first['reason']}"
        if first["reason"] and first["reason"] not in said:
            said += f": {first['reason']}"
        blocks = [event["block"] for event in events if event["block"] is not None]
        where = [f"step {first['step']}"] if first["step"] is not None else []
        if blocks:
            where.append(f"block{'s' if len(blocks) > 1 else ''} {in_ranges(blocks)}")
        if len(kinds := {event["call_kind"] for event in events if event["call_kind"]}) == 1:
            where.append(f"{kinds.pop()} attention")
        told = f" (first in {', '.join(where)})" if where else ""
        lines.append(
            f"{_SAID.get(first['kind'], first['kind'])} ×{sum(event['count'] for event in events)}: {said}{told}"
        )
    return lines


def notes(run: dict[str, Any]) -> list[str]:
    """The run's notes, without those that an event tells as well."""
    told = tuple(event["text"] for event in run["events"])
    return [note for note in run["notes"] if not note.startswith(told)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side; the first is flush left, the others right. Empty columns are left out."""
    kept = [place for place in range(len(rows[0])) if any(row[place] for row in rows[1:])]
    widths = {place: max(len(row[place]) for row in rows) for place in kept}
    lines = []
    for row in rows:
        cells = [row[place].rjust(widths[place]) if place else row[place].ljust(widths[place]) for place in kept]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _of_a_pipeline(run: dict[str, Any]) -> bool:
    """Was it a run of a diffusers pipeline, and not of ComfyUI?"""
    return run.get("host") == "diffusers"


def _kernels(run: dict[str, Any]) -> list[str]:
    rows = [("kernel", "calls", "thrown away", "attention time", "error (mean / largest)")]
    for name, kernel in run["kernels"].items():
        discarded = f"{kernel['discarded']:,}" if kernel["discarded"] else ""
        rows.append((name, f"{kernel['calls']:,}", discarded, share_text(kernel), error_text(kernel["error"])))
    lines = _table(rows) if len(rows) > 1 else []
    if not run["timed"]:
        how = _HOW_TO_TIME_A_PIPELINE if _of_a_pipeline(run) else HOW_TO_TIME
        lines.append(f"  Time was not measured: {how}.")
    elif run["untimed"]:
        lines.append(f"  {run['untimed']:,} calls were not timed.")
    return lines


def _course(run: dict[str, Any]) -> list[str]:
    lines = []
    parts = phases(run)
    for phase in parts[:_MOST]:
        told = []
        for kernels, kind, blocks in phase.rows:
            known = [block for block in blocks if block is not None]
            where = f" in block{'s' if len(known) > 1 else ''} {in_ranges(known)}" if known else ""
            told.append(f"{kernels}{f' for {kind} attention' if kind else ''}{where}")
        lines.append(f"  step{'s' if len(phase.steps) > 1 else ''} {in_ranges(phase.steps)}: {'; '.join(told)}")
    if len(parts) > _MOST:
        lines.append(f"  and {len(parts) - _MOST} more parts, in the JSON")
    return lines


def _refusals(run: dict[str, Any]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for plan in run["plans"]:
        if plan["requested"].startswith("auto"):
            continue
        for one in plan["refused"]:
            key = one["kernel"], "; ".join(one["reasons"])
            counts[key] = counts.get(key, 0) + plan["calls"]
    lines = [f"  {kernel} ×{count:,}: {why}" for (kernel, why), count in counts.items() if count]
    return lines if len(lines) <= _MOST else [*lines[:_MOST], f"  and {len(lines) - _MOST} more, in the JSON"]


def _section(head: str, lines: Sequence[str]) -> list[str]:
    return [head, *lines] if lines else []


def run_text(run: dict[str, Any], number: int = 0) -> str:
    """One run. `number`: which of several it is, from 1."""
    head = f"{run['model']}, {title(run)}: {run['status']}"
    if number:
        head = f"{number}. {head}"
    if run.get("sampler_node"):
        head += f", sampler node {run['sampler_node']}"
    if run.get("earlier"):
        head += " (in an earlier prompt; ComfyUI took the result from its cache)"
    lines = [head, f"{run.get('started', '')}, {run.get('seconds', 0):.1f} s, on {device_line(run)}"]
    stage = run["stage"]
    if stage["first_sigma"] is not None:
        lines.append(
            f"Noise from {stage['first_sigma']:.4g} to {stage['last_sigma']:.4g}, {run['forwards']:,} forwards"
        )
    if run["tokens"]:
        lines.append(f"Sequences of up to {run['tokens']:,} tokens (self attention)")
    node = "" if _of_a_pipeline(run) else "node "
    lines += _section("Asked for:", [f"  {rule['words']} ({node}{rule['node']})" for rule in run["policy"]])
    planned = ", ".join(f"{name} ×{count:,}" for name, count in run["planned"].items() if count)
    lines += [
        f"Planned: {planned or 'nothing'}",
        f"Ran: {kernel_summary([run]) or 'no attention call reached the pack'}",
    ]
    lines += _kernels(run)
    if measuring := run.get("measuring_seconds"):
        lines.append(f"  Measuring kernels for auto took {measuring:.2g} s of the run.")
    lines += _section("Where:", _course(run))
    if run["forwards_left_out"]:
        lines.append(f"  {run['forwards_left_out']:,} forwards found no room in this list; they are counted above.")
    lines += _section("Not used, and why:", _refusals(run))
    happened = [f"  {line}" for line in events_text(run)]
    if len(happened) > _MOST:
        happened = [*happened[:_MOST], f"  and {len(happened) - _MOST} more, in the JSON"]
    if run["repeated"]:
        happened.insert(0, f"  {run['repeated']} forward(s) were thrown away and done again")
    if run["events_left_out"]:
        happened.append(f"  and {run['events_left_out']:,} more")
    lines += _section("What did not go as planned:", happened)
    lines += _section("Notes:", [f"  {note}" for note in notes(run)])
    return "\n".join(lines)


def runs_text(runs: Sequence[dict[str, Any]], remarks: Sequence[str] = ()) -> str:
    """Several runs, in order, below what is to be said first."""
    numbered = len(runs) > 1
    parts = [run_text(run, number + 1 if numbered else 0) for number, run in enumerate(runs)]
    return "\n\n".join(["\n".join(remarks), *parts] if remarks else parts)
