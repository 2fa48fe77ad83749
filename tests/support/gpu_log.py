"""Remembers which GPU tests have really run, and where: docs/gpu-runs.json, from which docs/unmeasured.md is made.

A run on a machine with a CUDA device writes the file when ATTUNE_RECORD_GPU=1; commit it with what you measured.
"""

import datetime
import json
import os

import pytest

from .loading import ROOT

RUNS = ROOT / "docs" / "gpu-runs.json"
PAGE = ROOT / "docs" / "unmeasured.md"


def read_runs() -> dict[str, list[dict]]:
    """Test id → the runs of it that passed on a GPU: {gpu, torch, date}."""
    return json.loads(RUNS.read_text("utf-8")) if RUNS.exists() else {}


def page(gpu_tests: list[str], runs: dict[str, list[dict]]) -> str:
    """The text of docs/unmeasured.md: GPU tests that have never passed on any GPU, and where the others have."""
    never = sorted(test for test in gpu_tests if not runs.get(test))
    lines = [
        "# What no GPU has run",
        "",
        "Made by `python3 dev.py test --unmeasured` from the tests marked `gpu` and from `docs/gpu-runs.json`; do not",
        "edit it. A test leaves this list when it has passed on a GPU: run",
        "`ATTUNE_RECORD_GPU=1 python3 dev.py test -m gpu` there, then commit `docs/gpu-runs.json` and this page.",
        "",
        f"{len(never)} of {len(gpu_tests)} GPU tests have never run anywhere. Until they have, what the pack says",
        "about those kernels on a GPU comes from their sources, and from stand-ins with the same signatures",
        "that run on the CPU.",
        "",
        *(f"- `{test}`" for test in never),
    ]
    seen = {f"{run['gpu']} (torch {run['torch']}, {run['date']})" for test in gpu_tests for run in runs.get(test, [])}
    if seen:
        lines += ["", "## Where the others have passed", "", *(f"- {place}" for place in sorted(seen))]
    return "\n".join(lines) + "\n"


def pytest_addoption(parser):
    parser.addoption("--unmeasured", action="store_true", help="write docs/unmeasured.md and run nothing")


def pytest_collection_finish(session):
    if session.config.getoption("unmeasured"):
        tests = [item.nodeid for item in session.items if item.get_closest_marker("gpu")]
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(tests, read_runs()), encoding="utf-8", newline="\n")
        session.items.clear()


def pytest_sessionfinish(session):
    if session.config.getoption("unmeasured"):
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    wanted = os.environ.get("ATTUNE_RECORD_GPU") == "1"
    if wanted and item.get_closest_marker("gpu") and report.when == "call" and report.passed:
        import torch

        runs = read_runs()
        run = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }
        kept = [old for old in runs.get(item.nodeid, []) if old["gpu"] != run["gpu"]]
        runs[item.nodeid] = [*kept, run]
        RUNS.parent.mkdir(exist_ok=True)
        RUNS.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n", encoding="utf-8", newline="\n")
    return report
