"""The command `attune bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .shapes import MEMORY, SETS, Shape, parse_shape
from .workflow_command import UsageError, add_workflow_options, bench_workflow, check_options

_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class Ask(NamedTuple):
    """What is asked of the doctor: why each of `kernels` must not be run here, "" where it works."""

    kernels: Sequence[Any]
    machine: Any
    device: Any
    home: Path | None


def _chosen(kernels: Iterable[Any], wanted: str, exact: bool) -> list[Any]:
    known = {kernel.name: kernel for kernel in kernels}
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"unknown kernel {', '.join(unknown)}; known are: {', '.join(known)}")
    return [kernel for name, kernel in known.items() if (not names or name in names) and (kernel.exact or not exact)]


def _dtypes(wanted: str, device: Any) -> list[Any]:
    import torch

    if not wanted:
        wanted = "fp32" if device.type == "cpu" else "fp16,bf16"
        if device.capability and device.capability < (8, 0):
            wanted = "fp16"  # bfloat16 is emulated there
    names = [_DTYPES.get(name.strip(), name.strip()) for name in wanted.split(",") if name.strip()]
    if unknown := [name for name in names if name not in _DTYPES.values()]:
        raise UsageError(f"unknown data type {', '.join(unknown)}; known are: {', '.join(_DTYPES)}")
    return [getattr(torch, name) for name in dict.fromkeys(names)]


def _cases(options: argparse.Namespace, device: Any) -> list[Any]:
    from .bench import Case
    from .bench_inputs import read_captured

    if options.inputs:
        captured = read_captured(options.inputs)
        return [
            Case(one.shape, dtype, one.tensors)
            for one in captured
            for dtype in (_dtypes(options.dtypes, device) if options.dtypes else [one.tensors[0].dtype])
        ]
    shapes: list[Shape] = [MEMORY] if options.memory and not options.shape else []
    try:
        shapes += [parse_shape(text) for text in options.shape]
    except ValueError as error:
        raise UsageError(f"--shape: {error}") from None
    for name in filter(None, map(str.strip, options.shapes.split(","))):
        if name not in SETS:
            raise UsageError(f"unknown set of shapes {name!r}; known are: {', '.join(SETS)}")
        shapes += SETS[name]()
    if not shapes:
        shapes += SETS["smoke"]()
    dtypes = _dtypes(options.dtypes or ("fp16" if options.memory else ""), device)
    return [Case(shape, dtype) for shape in dict.fromkeys(shapes) for dtype in dtypes]


def _progress(done: int, in_all: int, text: str) -> None:
    """A line that replaces itself; nothing where nobody looks."""
    if sys.stderr.isatty():
        filled = 20 * done // max(in_all, 1)
        line = f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{in_all}  {text}"[:99]
        print(f"\r{line:<99}", end="", file=sys.stderr, flush=True)


def _write(options: argparse.Namespace, result: Mapping[str, Any], as_csv: Callable[[Mapping[str, Any]], str]) -> int:
    """Write the files that were asked for; each that cannot be written is told, and the others are."""
    from .bench_file import as_json, write
    from .bench_plot import HOW_TO_INSTALL, save_plot

    jobs: list[tuple[Path | None, Callable[[Path], Any]]] = [
        (options.json, lambda path: write(path, as_json(result))),
        (options.csv, lambda path: write(path, as_csv(result))),
        (options.plot, lambda path: save_plot(result, path)),
    ]
    status = 0
    for path, job in jobs:
        if path is None:
            continue
        try:
            job(path)
        except ImportError:
            print(HOW_TO_INSTALL, file=sys.stderr)
            status = 1
        except (OSError, ValueError) as error:
            print(f"{path} could not be written ({error})", file=sys.stderr)
            status = 1
    return status


def _check_paths(options: argparse.Namespace) -> None:
    """What cannot work is told before minutes of measuring, not after."""
    if not 0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds {options.seconds}: wanted a number above 0")
    for path in (options.json, options.csv, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.absolute().parent}")
    if options.plot is not None and options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {options.plot}: wanted a name that ends in .png, .svg or .pdf")


def _bench(options: argparse.Namespace) -> int:
    try:
        check_options(options, options.defaults)
        _check_paths(options)
    except UsageError as error:
        print(f"attune bench: {error}", file=sys.stderr)
        return 2
    return bench_workflow(options, _progress, _write) if options.workflow else _bench_calls(options)


def _bench_calls(options: argparse.Namespace) -> int:
    from ..attention.machine import read_machine
    from .bench import Bench, run_bench
    from .bench_file import as_csv
    from .bench_inputs import NoInputsError
    from .bench_table import table
    from .timing import Effort

    machine = read_machine()
    known = [device.name for device in machine.devices]
    try:
        if options.device and options.device not in known:
            raise UsageError(f"unknown device {options.device!r}: here are {', '.join(known)}")
        device = machine.device(options.device) if options.device else machine.main_device
        kernels = _chosen(options.all_kernels(), options.kernels, exact=options.memory)
        cases = _cases(options, device)
    except (UsageError, NoInputsError, OSError) as error:
        print(f"attune bench: {error}", file=sys.stderr)
        return 2
    if options.unproved:
        verdicts = {kernel.name: "" for kernel in kernels}
    else:
        verdicts = options.verdicts(Ask(kernels, machine, device, options.home))
    effort = Effort(budget=options.seconds)
    if options.memory:
        effort = Effort(warm=0, least=1, most=1, budget=0.0)
    bench = Bench(
        kernels,
        machine,
        device.name,
        cases,
        verdicts,
        effort,
        options.seed,
        scores=not options.memory,
        one_error=options.memory,
        told=_progress,
    )
    result = run_bench(bench)
    if sys.stderr.isatty():
        print(f"\r{'':<99}\r", end="", file=sys.stderr)
    result["options"] = {
        "shapes": options.shapes,
        "shape": options.shape,
        "kernels": options.kernels,
        "inputs": options.inputs.name if options.inputs else "",
        "memory": options.memory,
        "seconds": options.seconds,
        "seed": options.seed,
        "unproved": options.unproved,
    }
    status = _write(options, result, as_csv)  # first: what reads the text may be gone, as `head` is
    print(table(result))
    if options.memory:
        print(memory_text(result["rows"]))
    return 130 if result["interrupted"] == "Ctrl+C" else 1 if result["interrupted"] else status


def memory_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the scores would take, for each case once."""
    from .bench_machine import gib

    sizes = {
        row["shape"]: row["batch"]
        * row["heads"]
        * row["q_len"]
        * row["kv_len"]
        * (4 if row["dtype"] == "float32" else 2)
        for row in rows
    }
    return "\n".join(
        f"\n{shape}: the scores would take {gib(size)}; what would write them out was refused beforehand."
        for shape, size in sizes.items()
    )


def add_bench(
    commands: Any, kernels: Callable[[], Sequence[Any]], verdicts: Callable[[Ask], Mapping[str, str]]
) -> None:
    """Add `bench` to the parser's commands. `kernels` gives all of them, `verdicts` why they must not be run."""
    about = "time every kernel on the shapes of real models, with its error and its memory"
    parser = commands.add_parser(
        "bench", help=about, description=f"{about}. Sets of shapes: {', '.join(SETS)}. See docs/benchmarks.md."
    )
    add = parser.add_argument
    add("--shapes", default="", metavar="SET,...", help="sets of shapes (without any shape: smoke)")
    add("--shape", action="append", default=[], metavar="B,H,N,M,D", help="a shape of your own; may be given often")
    add("--inputs", type=Path, metavar="FILE", help="captured tensors (safetensors) in place of shapes")
    add("--memory", action="store_true", help="one call whose scores would take 112.5 GiB: who runs it, who refuses")
    add("--kernels", default="", metavar="NAME,...", help="only these kernels (workflows: host,sdpa,auto)")
    add("--dtypes", default="", metavar="NAME,...", help="fp16, bf16, fp32 (GPU: fp16,bf16; CPU: fp32)")
    add("--seconds", type=float, default=1.0, help="time for each row, about (1)")
    add("--seed", type=int, default=0, help="of the made inputs (0)")
    add("--device", default="", help="the GPU to measure, as torch calls it: cuda:1")
    add("--json", type=Path, metavar="FILE", help="write the result as JSON")
    add("--csv", type=Path, metavar="FILE", help="write the result as CSV")
    add("--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg, .pdf); needs matplotlib")
    add("--unproved", action="store_true", help="also run kernels that the doctor has not proved, in this process")
    add("--home", type=Path, help="the folder of the pack's state, where ComfyUI has another user directory")
    add_workflow_options(add)
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(run=_bench, all_kernels=kernels, verdicts=verdicts, defaults=defaults)
