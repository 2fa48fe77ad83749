"""Our kernels compiled for GPUs that are not here: benchmarks/static/ still says what the compiler makes of them."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from support.interpreter import WHY_NOT
from support.loading import ROOT

_spec = importlib.util.spec_from_file_location("attune_int8_static", ROOT / "benchmarks" / "int8_static.py")
assert _spec and _spec.loader
STATIC: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(STATIC)
REPORTS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(STATIC.REPORTS.glob("sm_*.json"))}
# Compiled again by this test. The others take another minute: `python benchmarks/int8_static.py --write`.
AGAIN = [
    *((target, "attend-128") for target in STATIC.TARGETS),
    *(("sm_90", case) for case in ("attend-64", "attend-128-mask", "quantise-128", "statistics-128", "exact-128")),
]
# What a change may cost before this test asks for a look, and for reports to be written again.
REGISTERS, INSTRUCTIONS, SHARED = 8, 1.02, 1.1


def test_every_shipped_tile_has_its_report() -> None:
    assert set(REPORTS) == set(STATIC.TARGETS)
    for target, report in REPORTS.items():
        assert tuple(report["kernels"]) == STATIC.CASES, target


@pytest.mark.parametrize("target", STATIC.TARGETS)
def test_no_loop_touches_local_memory(target: str) -> None:
    for name, found in REPORTS[target]["kernels"].items():
        assert found["loop"].get("spills", 0) == 0, name
        assert found["stack"] <= 64, name  # around the loop, once
        assert found["shared"] <= (99 << 10 if target in ("sm_89", "sm_120") else 163 << 10), name


def test_on_hopper_exponentials_run_under_matrix_instructions() -> None:
    """Of the 66 of a block (64 weights, 2 rows) four fifths; half with 64 channels, where products are short."""
    kernels = REPORTS["sm_90"]["kernels"]
    assert kernels["attend-128"]["loop"]["overlapped"] >= 50
    assert kernels["attend-64"]["loop"]["overlapped"] >= 28
    assert kernels["exact-128"]["loop"]["overlapped"] >= 32  # of 34
    assert {matrix.rpartition(".m64")[0] for matrix in kernels["attend-128"]["matrix"]} == {
        "wgmma.mma_async.sync.aligned"
    }


def test_scores_are_multiplied_in_8_bits_and_values_in_what_the_gpu_has() -> None:
    for target, report in REPORTS.items():
        matrix = " ".join(report["kernels"]["attend-128"]["matrix"])
        assert "s32.s8.s8" in matrix, target
        assert ("e4m3" in matrix or "tcgen05" in matrix) is (target != "sm_80"), target


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize(("target", "name"), AGAIN)
def test_compiled_again_it_is_what_the_report_says(target: str, name: str, tmp_path, monkeypatch) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    known = REPORTS[target]
    if triton.__version__ != known["triton"]:
        pytest.skip(f"the reports are Triton {known['triton']}'s, installed is {triton.__version__}")
    found, was = STATIC.report(name, target), known["kernels"][name]
    again = "look at what changed, then run `python benchmarks/int8_static.py --write`"
    assert found["tile"] == was["tile"], again
    assert found["matrix"] == was["matrix"], again
    assert found["registers"] <= was["registers"] + REGISTERS, again
    assert found["shared"] <= was["shared"] * SHARED, again
    assert found["stack"] <= max(was["stack"], 64), again
    loop: dict[str, Any] = found["loop"]
    assert loop["spills"] <= was["loop"]["spills"], again
    assert loop["overlapped"] >= was["loop"]["overlapped"] - 2, f"{loop['order']}: {again}"
    assert loop["instructions"] <= was["loop"]["instructions"] * INSTRUCTIONS, again
