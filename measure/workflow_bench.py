"""Whole workflows on a real server: once per number of frames and kernel, each stage timed, the outputs compared."""

from __future__ import annotations

import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..attention.policy import FAMILIES
from .workflow_file import WorkflowError
from .workflow_graph import Job
from .workflow_pictures import Agreement, Pictures, agreement, fetch, size
from .workflow_result import KIND, SCHEMA, TOTAL, UNITS, empty_row, machine_data
from .workflow_server import RejectedError, Run, Server, ServerError

_NOTHING = (
    "the pack recorded no attention call: it is switched off at the server (ATTUNE=off), or no model was sampled that "
    "it reaches"
)
Told = Callable[[int, int, str], None]  # runs that are done, of how many, what is being done


@dataclass(frozen=True)
class Plan:
    """What is to be run. `kernels`: the first is the baseline. `frames`: None for what the workflow says itself."""

    name: str
    kernels: Sequence[str]
    frames: Sequence[int | None]
    repeats: int = 1
    size: tuple[int, int] | None = None

    @property
    def runs(self) -> int:
        """In all: before each number of frames the baseline untimed, and each other kernel once before the first."""
        return len(self.frames) * (1 + len(self.kernels) * self.repeats) + len(self.kernels) - 1


@dataclass
class _Cell:
    """A kernel at a number of frames: its timed runs, what really ran in them, how near the baseline's pictures are."""

    runs: list[Run] = field(default_factory=list)
    observed: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)
    samplers: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None
    agreement: Agreement | str = ""


class WorkflowBench:
    """One measurement. `run` gives the result as it is written."""

    def __init__(self, server: Server, job: Job, plan: Plan, told: Told, said: Callable[[str], None]) -> None:
        self.server, self.job, self.plan, self.told, self.said = server, job, plan, told, said
        self.done = 0

    def run(self) -> dict[str, Any]:
        """Raises RejectedError where the server takes not even the first prompt, WorkflowError where the pack does not
        tell what ran in it. Ctrl+C gives what there is.
        """
        result: dict[str, Any] = {
            "kind": KIND,
            "schema": SCHEMA,
            "units": UNITS,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine_data(self.server.get("/system_stats")),
            "baseline": self.plan.kernels[0],
            "notes": list(self.job.notes),
            "interrupted": "",
            "rows": [],
        }
        try:
            for frames in self.plan.frames:
                self._one_length(frames, result["rows"])
        except KeyboardInterrupt:
            result["interrupted"] = "Ctrl+C"
        except ServerError as error:
            result["interrupted"] = str(error)
        return result

    def _one_length(self, frames: int | None, rows: list[dict[str, Any]]) -> None:
        """Measure all kernels at one number of frames; its rows are added whatever happens."""
        cells = {kernel: _Cell() for kernel in self.plan.kernels}
        baseline = self.plan.kernels[0]
        wanted: Pictures = []
        try:
            for kernel in self.plan.kernels:
                # Untimed: models are loaded, kernels compiled, memory is reserved for this size.
                if kernel == baseline or frames == self.plan.frames[0]:
                    run = self._once(kernel, frames, "warm-up")
                    if kernel == baseline and isinstance(run, Run):
                        wanted = self._pictures(run)
                        self._require_record(run)
            for repeat in range(self.plan.repeats):
                for kernel, cell in cells.items():
                    run = self._once(kernel, frames, f"run {repeat + 1} of {self.plan.repeats}")
                    if isinstance(run, str):
                        cell.failed.append(run)
                        continue
                    self._observe(run, cell)
                    cell.runs.append(run)
                    if repeat == 0:
                        pictures = self._pictures(run)
                        cell.size = size(pictures)
                        cell.agreement = agreement(wanted, pictures) if self.job.taps else ""
                    self.said(f"{self._place(kernel, frames)}: {self._total(run):.2f} s")
        finally:
            shown = next((cell.size for cell in cells.values() if cell.size), None)
            for kernel, cell in cells.items():
                rows.extend(self._rows(kernel, frames, cell, shown))

    def _place(self, kernel: str, frames: int | None) -> str:
        return kernel if frames is None else f"{kernel}, {frames} frames"

    def _once(self, kernel: str, frames: int | None, what: str) -> Run | str:
        """Run the workflow once; a text says why that failed."""
        place = self._place(kernel, frames)
        prompt = self.job.variant(kernel, frames, uuid.uuid4().hex, self.plan.size)

        def told(node: str, step: str) -> None:
            title = self.job.prompt.get(node, {}).get("class_type", "")
            self.told(self.done, self.plan.runs, f"{place}, {what}: {title} {node} {step}")

        told("", "")
        try:
            run = self.server.run(prompt, told)
        except RejectedError as error:
            if not self.done:
                raise
            run = Run("", "error", f"the server does not accept it: {error}")
        self.done += 1
        if run.status == "success":
            return run
        reason = run.reason or "it was interrupted at the server"
        self.said(f"{place}, {what}: failed: {reason}")
        return reason

    def _pictures(self, run: Run) -> Pictures:
        try:
            return fetch(run.outputs, self.job.taps, self.server.fetch)
        except OSError as error:
            self.said(f"the pictures could not be fetched ({error}): they are not compared")
            return []

    def _records(self, run: Run) -> list[dict[str, Any]]:
        """What really ran, by the pack's own record on the server."""
        return [one for one in self.server.get("/attune/runs")["runs"] if one["prompt_id"] == run.prompt_id]

    def _require_record(self, run: Run) -> None:
        if not any(record["observed"] for record in self._records(run)):
            raise WorkflowError(_NOTHING)

    def _observe(self, run: Run, cell: _Cell) -> None:
        for record in self._records(run):
            cell.observed.update(record["observed"])
            cell.samplers.add(str(record["sampler_node"]))
            for node in record["nodes"].values():
                for refused in node["refused"]:
                    cell.refused.setdefault(refused["kernel"], "; ".join(refused["reasons"]))

    def _total(self, run: Run) -> float:
        """The whole run, without what this measurement adds to it."""
        return run.seconds - sum(run.nodes.get(node, 0.0) for node in self.job.added)

    def _rows(
        self, kernel: str, frames: int | None, cell: _Cell, shown: tuple[int, int] | None
    ) -> list[dict[str, Any]]:
        if not cell.runs and not cell.failed:
            return []  # it was not begun
        asked = self.plan.size or (self.job.said("width"), self.job.said("height"))
        width, height = shown or asked
        status, reason = judge(kernel, cell)
        row = {
            "workflow": self.plan.name,
            "kernel": kernel,
            "observed": ", ".join(f"{name} {count}" for name, count in cell.observed.most_common()),
            "frames": self.job.said("frames") if frames is None else frames,
            "width": width,
            "height": height,
            "status": status,
            "reason": reason,
        }
        total = empty_row(**row, stage=TOTAL, **_times([self._total(run) for run in cell.runs]))
        if isinstance(cell.agreement, Agreement):
            total |= {
                "psnr_db": cell.agreement.psnr,
                "ssim": cell.agreement.ssim if cell.agreement.ssim == cell.agreement.ssim else None,
                "largest_difference": cell.agreement.largest,
            }
        elif cell.agreement:
            total["reason"] = "; ".join(filter(None, (reason, cell.agreement)))
        rows = [total]
        for node, title in self.job.stages.items() if cell.runs else ():
            stage = row | {"stage": self.job.prompt[node]["class_type"], "node": node, "title": title, "reason": ""}
            times = [run.nodes[node] for run in cell.runs if node in run.nodes]
            if not times:
                cached = all(node in run.cached for run in cell.runs)
                rows.append(empty_row(**stage | {"status": "cached" if cached else "failed", "reason": _idle(cached)}))
                continue
            steps = [run.steps[node] for run in cell.runs if node in run.steps] if node in cell.samplers else []
            each = [seconds for _, seconds in steps if seconds is not None]
            rows.append(
                empty_row(
                    **stage,
                    **_times(times),
                    steps=steps[0][0] if steps else None,
                    seconds_per_step=statistics.median(each) if each else None,
                )
            )
        return rows


def _idle(cached: bool) -> str:
    return "nothing before it had changed: the server kept its result" if cached else "it did not run"


def _times(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    if not seconds:
        return {}
    quarters = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    low, middle, high = quarters
    return {"seconds": middle, "low_seconds": low, "high_seconds": high, "repeats": len(seconds)}


def judge(kernel: str, cell: _Cell) -> tuple[str, str]:
    """(status, reason) of a kernel: did it run, and was it this one?"""
    failed = list(dict.fromkeys(cell.failed))
    if not cell.runs:
        return "failed", "; ".join(failed)
    reasons = [f"{len(cell.failed)} of {len(cell.failed) + len(cell.runs)} runs failed: {failed[0]}"] if failed else []
    calls = sum(cell.observed.values())
    if not calls:
        return "failed", "; ".join([_NOTHING, *reasons])
    if kernel in ("auto", "auto_fast"):
        return "measured", "; ".join(reasons)
    meant = {kernel, *FAMILIES.get(kernel, ())}
    others = {name: count for name, count in cell.observed.items() if name not in meant}
    if not others:
        return "measured", "; ".join(reasons)
    why = "; ".join(f"{name}: {said}" for name, said in cell.refused.items() if name in meant)
    ran = ", ".join(f"{count} on {name}" for name, count in others.items())
    reasons.insert(0, f"of {calls} calls {ran}" + (f" ({why})" if why else ""))
    return "other kernel" if sum(others.values()) == calls else "measured", "; ".join(reasons)
