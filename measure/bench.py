"""Kernels × shapes × data types on this machine: a row of figures for each, or the reason why there are none."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch

from ..attention.call import AttentionCall
from ..attention.driver import Sense
from ..attention.kernel import Kernel, Run, reasons_against
from ..attention.machine import Machine
from .bench_errors import ROWS, Truth, kernel_errors, right_answers
from .bench_file import KIND, SCHEMA, UNITS, empty_row
from .bench_inputs import Inputs, Tensors, input_bytes
from .bench_machine import free_bytes, gib, machine_data, sensing
from .shapes import Shape
from .timing import Effort, matmul_peak, measure


@dataclass(frozen=True)
class Case:
    """A shape in one data type; `captured` are real tensors of that shape."""

    shape: Shape
    dtype: torch.dtype
    captured: Tensors | None = None


@dataclass(frozen=True)
class Bench:
    """What is measured, and how.

    `verdicts` maps kernels to the reason why they must not be run in this process, "" where they may; a kernel that is
    not in it may not. `scores` False refuses what allocates as much as the scores hold. `sense` reads the device's
    clock and power in place of its driver. `stop()` is asked before each row and each timed call: True ends it all as
    Ctrl+C does.
    """

    kernels: Sequence[Kernel]
    machine: Machine
    device: str
    cases: Sequence[Case]
    verdicts: Mapping[str, str]
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    scores: bool = True
    one_error: bool = False  # compare one kind of input only: where a call takes minutes
    sense: Sense | None = None
    told: Callable[[int, int, str], Any] = lambda _done, _all, _text: None
    stop: Callable[[], bool] = lambda: False

    def heed(self) -> None:
        """Raises KeyboardInterrupt where the measuring is to end now."""
        if self.stop():
            raise KeyboardInterrupt


class _DeviceLostError(RuntimeError):
    """After this no call on the device can succeed."""


def describe_case(case: Case, device: str) -> AttentionCall:
    batch, heads, q_len, kv_len, dim = case.shape.numbers
    return AttentionCall(batch, heads, heads, q_len, kv_len, dim, dim, case.dtype, device)


def refusal(bench: Bench, kernel: Kernel, case: Case, free: int) -> tuple[str, str]:
    """(status, reason) of a kernel that is not run, told without running or allocating anything; ("", "") if it is."""
    call = describe_case(case, bench.device)
    if reasons := reasons_against(kernel, call, bench.machine):
        return "refused", "; ".join(reasons)
    if why := bench.verdicts.get(kernel.name, "it has no verdict on this machine"):
        return "not proved", why
    needed, scores = kernel.workspace_bytes(call), call.score_bytes // 4 * case.dtype.itemsize
    said = f"needs {gib(needed)} beyond inputs and output"
    if not bench.scores and needed >= scores:
        return "refused", f"{said}, and would write out the scores"
    if needed > free:
        return "refused", f"{said}, {gib(max(free, 0))} are free"
    return "", ""


def _extra_bytes(run: Run, tensors: Tensors, device: torch.device) -> int | None:
    """What one call allocates at its peak beyond inputs and output; None where the device does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = run(*tensors)
    torch.cuda.synchronize(device)
    return max(0, int(torch.cuda.max_memory_allocated(device)) - before - out.numel() * out.element_size())


def _figures(
    bench: Bench, kernel: Kernel, run: Run, case: Case, inputs: Inputs, truths: Sequence[Truth], peak: float
) -> dict[str, Any]:
    """The measured part of a row. Raises what the kernel raises."""
    device = torch.device(bench.device)
    # Errors first: a kernel whose output is no answer is not timed.
    errors = kernel_errors(run, kernel, inputs, truths)
    allowed = kernel.tolerance[case.dtype]
    verdict = "works"
    if math.isnan(errors.l2):
        verdict = "wrong numbers: NaN or infinity"
    elif errors.l2 > allowed:
        verdict = f"wrong numbers: relative L2 {errors.l2:.2g}, allowed {allowed:.2g}"
    read: list[tuple[float | None, float | None]] = []
    sense = bench.sense
    inputs.begin()

    def fresh() -> None:
        bench.heed()
        inputs.fresh()

    times = measure(
        lambda: run(*inputs.for_kernel(kernel.layout)),
        device,
        bench.effort,
        fresh,
        None if sense is None else lambda: read.append(sense()),
    )
    clock, power = read[0] if read else (None, None)
    tflops = case.shape.flops / times.median / 1e12
    return {
        "status": "measured",
        "verdict": verdict,
        "median_ms": times.median * 1000,
        "low_ms": times.low * 1000,
        "high_ms": times.high * 1000,
        "repeats": len(times.seconds),
        "tflops": tflops,
        "peak_share": tflops / peak if peak > 0 else None,
        "extra_bytes": _extra_bytes(run, inputs.for_kernel(kernel.layout), device),
        **{
            name: None if math.isnan(value := getattr(errors, name)) else value
            for name in ("cosine", "l1", "l2", "largest")
        },
        "compared_rows": case.shape.q_len if truths[0].rows is None else ROWS,
        "clock_mhz": clock,
        "power_w": power,
    }


def _attempt(device: torch.device, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, or why it failed. Raises _DeviceLostError where the device is lost with it."""
    try:
        return work()
    except Exception as error:  # a kernel is somebody else's code: its row says what happened, the others go on
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            why = "out of memory"
        else:
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise _DeviceLostError(f"the GPU was lost: {why}") from error
    return {"status": "failed", "reason": why}


def run_bench(bench: Bench) -> dict[str, Any]:
    """The result as docs/benchmarks.md describes it. On Ctrl+C, or told to stop, it holds what was measured so far."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "kind": KIND,
        "schema": SCHEMA,
        "units": UNITS,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine_data(bench.machine, bench.device),
        "peak_tflops": {},
        "interrupted": "",
        "rows": rows,
    }
    device = torch.device(bench.device)
    try:
        # Triton launches on the current GPU, whatever GPU the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), sensing(device) as sense:
            bench = replace(bench, sense=bench.sense or sense)
            for number, case in enumerate(bench.cases):
                _run_case(bench, case, number * len(bench.kernels), rows, result["peak_tflops"])
    except KeyboardInterrupt:
        result["interrupted"] = "Ctrl+C"
    except _DeviceLostError as error:
        result["interrupted"] = str(error)
    return result


def _run_case(bench: Bench, case: Case, done: int, rows: list[dict[str, Any]], peaks: dict[str, float]) -> None:
    """Add the rows of one case, each as soon as it is complete."""
    device, in_all = torch.device(bench.device), len(bench.cases) * len(bench.kernels)
    dtype = str(case.dtype).removeprefix("torch.")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the last case's memory, in pieces of other sizes
    held = input_bytes(case.shape, case.dtype)
    free = free_bytes(device) - held
    blank = empty_row(case.shape, dtype)
    prepared: tuple[Inputs, list[Truth]] | None = None
    broken: dict[str, Any] = {}  # why there are no inputs: it is the same for every kernel
    if free < 0:
        broken = {"status": "refused", "reason": f"the inputs take {gib(held)}, {gib(free + held)} are free"}

    def prepare() -> dict[str, Any]:
        nonlocal prepared
        if dtype not in peaks:
            bench.told(done, in_all, f"matmul peak, {dtype}")
            peaks[dtype] = matmul_peak(device, case.dtype)
        bench.told(done, in_all, f"inputs and reference, {case.shape.name} {dtype}")
        inputs = Inputs(case.shape, case.dtype, device, bench.seed, case.captured)
        prepared = (inputs, right_answers(inputs, bench.one_error, bench.seed))
        return {}

    for place, kernel in enumerate(bench.kernels):
        bench.heed()
        row = {**blank, "kernel": kernel.name}
        status, reason = refusal(bench, kernel, case, max(free, 0))
        if status:
            rows.append({**row, "status": status, "reason": reason})
            continue
        if prepared is None and not broken:
            broken = _attempt(device, prepare)
        if prepared is None:
            rows.append({**row, **broken})
            continue
        inputs, truths = prepared
        bench.told(done + place, in_all, f"{case.shape.name} {dtype} {kernel.name}")

        def work(kernel: Kernel = kernel, inputs: Inputs = inputs, truths: Sequence[Truth] = truths) -> dict[str, Any]:
            run = kernel.load()
            return _figures(bench, kernel, run, case, inputs, truths, peaks[dtype])

        try:
            rows.append({**row, **_attempt(device, work)})
        except _DeviceLostError as error:
            rows.append({**row, "status": "failed", "reason": str(error)})
            raise
    bench.told(done + len(bench.kernels), in_all, f"{case.shape.name} {dtype}")
