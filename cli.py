"""The command `attune`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from .attention.listing import kernel_rows
from .attention.machine import Machine, read_machine
from .doctor.cache_command import add_cache
from .doctor.commands import add_quarantine
from .doctor.doctor_command import add_doctor
from .doctor.get_command import add_get
from .doctor.hub import announce
from .doctor.store import home
from .graphs.command import add_workflow
from .measure.bench_command import Ask, add_bench
from .measure.compare_command import add_compare
from .measure.report_command import add_report
from .pipelines.run_script import add_run


def _print_table(rows: list[dict[str, Any]], machine: Machine) -> None:
    device = machine.main_device
    print(f"{device.title} ({device.architecture.value}{', ' + device.sm if device.sm else ''}), torch {machine.torch}")
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(
            f"{row['name']:<{width}}  {row['precision']:<6}  {row['status']:<13}  {'; '.join(row['reasons'])}".rstrip()
        )


def _kernels(options: argparse.Namespace) -> int:
    from .kernels import KERNELS

    machine = read_machine()
    rows = kernel_rows({kernel.name: kernel for kernel in KERNELS}, machine)
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        _print_table(rows, machine)
    return 0


def _all_kernels() -> tuple[Any, ...]:
    from .kernels import KERNELS

    return KERNELS


def _failed(folder: Path, kernels: dict[str, Any], machine: Machine) -> dict[str, tuple[str, int]]:
    """Which kernels failed in models that ComfyUI, or a script, sampled on this machine: name → (why, in how many)."""
    from .host.remembered import failed

    return failed(folder, kernels, machine)


def _why_not_run(ask: Ask) -> dict[str, str]:
    """Why each kernel must not be run in this process, "" where the doctor found that it works."""
    from .doctor.probe import examine, use_choices

    pack = Path(__file__).parent
    folder = ask.home.absolute() if ask.home else home(pack)

    def told(name: str, verdict: Any) -> None:
        if not verdict.reasons:
            print(f"tried in a child process: {name}: {verdict.outcome}", file=sys.stderr)

    verdicts = examine(ask.kernels, ask.machine, pack, folder, ask.device, told=told)
    kernels = {kernel.name: kernel for kernel in ask.kernels}
    use_choices(kernels, ask.machine, ask.device or ask.machine.main_device, verdicts)
    return {
        name: "" if verdict.works else "; ".join(verdict.reasons) or f"{verdict.outcome}: {verdict.detail}"
        for name, verdict in verdicts.items()
    }


def _env(options: argparse.Namespace) -> int:
    from .doctor.env_file import best_kernel, env_line, write_line
    from .kernels import KERNELS

    line = env_line(best_kernel({kernel.name: kernel for kernel in KERNELS}, read_machine(), options.fast))
    if options.write is None:
        print(line)
        return 0
    try:
        write_line(options.write, line)
    except (OSError, UnicodeDecodeError) as error:
        print(
            f"{options.write} could not be written ({error}); it is as it was. Wanted: a text file in UTF-8 that "
            f"you may change, or a new one in a folder that is there. The line is: {line}",
            file=sys.stderr,
        )
        return 1
    print(f"{options.write}: {line}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="attune", description="Attention that tunes itself.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    kernels = commands.add_parser("kernels", help="every attention kernel, and whether it can run on this machine")
    kernels.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    kernels.set_defaults(run=_kernels)
    env = commands.add_parser("env", help="the line that makes the best kernel here the default of ComfyUI")
    env.add_argument("--fast", action="store_true", help="also consider 8-bit kernels, which change results slightly")
    env.add_argument("--write", type=Path, metavar="FILE", help="put the line into FILE, replacing only its own line")
    env.set_defaults(run=_env)
    add_doctor(commands, Path(__file__).parent, _all_kernels, _failed)
    add_cache(commands, Path(__file__).parent)
    add_get(commands, Path(__file__).parent)
    add_quarantine(commands, Path(__file__).parent)
    add_bench(commands, _all_kernels, _why_not_run)
    add_compare(commands)
    add_run(commands)
    add_workflow(commands)
    add_report(commands, lambda state: (state or home(Path(__file__).parent)) / "runs")
    options = parser.parse_args(arguments)
    announce(home(Path(__file__).parent))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a Windows console may lack letters of a path
    try:
        status = int(options.run(options))
        if options.command != "run":  # what a script has made of stdout is left to Python
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # what reads our output has seen enough, as `head` has
        if options.command == "run":  # a script's own matter
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
