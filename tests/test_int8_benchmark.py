"""benchmarks/int8.py and int8_aims.py: judgements on made-up figures, and the whole of it once on the CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from support.interpreter import WHY_NOT
from support.loading import ROOT

PROGRAM = ROOT / "benchmarks" / "int8.py"
SPEC = importlib.util.spec_from_file_location("attune_int8_speed", PROGRAM)
assert SPEC and SPEC.loader
BENCH: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(BENCH)
AIMS: Any = sys.modules["int8_aims"]
H200 = "NVIDIA H200"
FIRST = {"attune_int8": 7.5, "attune_bf16": 3.0}


def row(shape: str, kernel: str, ms: float, **changes: Any) -> dict[str, Any]:
    batch, heads, n, m, dim = BENCH.SHAPES[shape]
    exact = not kernel.startswith(("attune_int8", "sage", "kitchen"))
    version = {"sage1": "1.0.6", "kitchen_int8": "0.2.40"}.get(kernel, "")
    found = {"shape": shape, "kernel": kernel, "ms": ms, "exact": exact, "version": version}
    found["tops"] = 4 * batch * heads * n * m * dim / ms / 1e9
    if kernel in BENCH.OURS:
        allowed = BENCH.quantised_bytes(BENCH.SHAPES[shape], 1)
        found |= {"cpu_us": 22.0, "launches": 3, "waits": False, "extra": int(1.005 * allowed), "allowed": allowed}
    if kernel == "attune_bf16":
        found["launches"] = 1
    return found | changes


# Milliseconds as they are hoped for: every goal is met, none of the stretches.
HOPED = {
    "wan-75600": {
        "attune_int8": 108, "attune_bf16": 190, "sdpa": 182, "sdpa_cudnn": 180, "kitchen_int8": 190, "sage1": 210,
    },
    "wan-32760": {
        "attune_int8": 20.5, "attune_bf16": 36, "sdpa": 35, "sdpa_cudnn": 34, "kitchen_int8": 36, "sage1": 40,
    },
    "wan-cross": {"attune_int8": 1.0, "attune_bf16": 1.2, "sdpa": 1.2},
    "sdxl-4096": {"attune_int8": 0.5, "attune_bf16": 0.6, "sdpa": 0.6},
}  # fmt: skip


def judged(changes: dict[str, dict[str, Any]] | None = None, gpu: str = H200, **options: Any) -> dict[str, str]:
    """ "aim shape" → verdict. changes: kernel → fields of its rows, or None to leave it out."""
    rows = [row(shape, kernel, ms) for shape, times in HOPED.items() for kernel, ms in times.items()]
    for kernel, fields in (changes or {}).items():
        rows = [each | (fields or {}) if each["kernel"] == kernel else each for each in rows]
        rows = [each for each in rows if fields is not None or each["kernel"] != kernel]
    options = {"left_out": {shape: {"sage1": "is not installed"} for shape in HOPED}, "first": FIRST, **options}
    found = list(AIMS.verdicts(rows, options["left_out"], options["first"], gpu))
    assert len({(each["aim"], each["shape"]) for each in found}) == len(found)
    assert all(each["aim"] in AIMS.told(each) and each["verdict"] in AIMS.told(each) for each in found)
    return {f"{each['aim']} {each['shape']}": each["verdict"] for each in found}


def test_every_cell_of_the_table_has_its_verdict() -> None:
    found = judged()
    for shape in AIMS.SELF:
        assert found[f"attune_int8: TOPS {shape}"] == "goal met"
        for other in AIMS.TIMES_AS_FAST:
            assert found[f"attune_int8: times as fast as {other} {shape}"] == "goal met"
        assert found[f"attune_bf16: times as fast as the best exact kernel {shape}"] == "met"
    assert not any("missed" in verdict or "no" in verdict.split() for verdict in found.values()), found
    assert len(found) == 2 * 6 + 2 + 2 * 4


@pytest.mark.parametrize(
    ("changes", "aim", "verdict"),
    [
        ({"attune_int8": {"tops": 879.0}}, "attune_int8: TOPS wan-75600", "missed"),
        ({"attune_int8": {"tops": 880.0}}, "attune_int8: TOPS wan-75600", "met"),
        ({"attune_int8": {"tops": 1200.0}}, "attune_int8: TOPS wan-75600", "stretch met"),
        ({"attune_int8": {"tops": float("nan")}}, "attune_int8: TOPS wan-75600", "missed"),
        ({"sdpa_cudnn": {"ms": 26.0}}, "attune_int8: times as fast as the best SDPA back end wan-32760", "missed"),
        ({"sdpa_cudnn": {"ms": 30.0}}, "attune_int8: times as fast as the best SDPA back end wan-32760", "met"),
        ({"kitchen_int8": {"ms": 41.1}}, "attune_int8: times as fast as kitchen_int8 wan-32760", "stretch met"),
        ({"attune_bf16": {"ms": 201.0}}, "attune_bf16: times as fast as the best exact kernel wan-75600", "missed"),
        ({"attune_int8": {"launches": 4}}, "attune_int8: launches a call the worst", "missed"),
        ({"attune_int8": {"cpu_us": 30.5}}, "attune_int8: microseconds of the CPU a call the worst", "missed"),
        ({"attune_int8": {"waits": True}}, "attune_int8: does a call wait for the GPU the worst", "missed"),
    ],
)
def test_what_is_missed_is_said_to_be_missed(changes: dict[str, Any], aim: str, verdict: str) -> None:
    assert judged(changes)[aim] == verdict


def test_more_memory_than_the_quantised_tensors_is_missed() -> None:
    twice = 2 * BENCH.quantised_bytes(BENCH.SHAPES["wan-32760"], 1)
    aim = "attune_int8: memory beyond that of K and V in 8 bits (e4m3) wan-32760"
    assert judged()[aim] == "met" and judged({"attune_int8": {"extra": twice}})[aim] == "missed"


def test_where_sdpa_is_faster_auto_has_to_take_it() -> None:
    for shape in ("wan-cross", "sdxl-4096"):
        aim = f"attune_int8: times as fast as the best SDPA back end, or auto sends it there {shape}"
        assert judged()[aim] == "met"
        assert judged({"sdpa": {"ms": 0.4}})[aim].startswith("missed: auto has to send it to SDPA")


def test_what_is_missing_is_not_measured_and_never_met() -> None:
    against = "attune_int8: times as fast as sage1 wan-75600"
    assert judged({"sage1": None})[against] == "not measured: sage1: is not installed"
    assert judged({"sage1": {"version": "1.0.5"}})[against].startswith(
        "no verdict: the aim is against sageattention 1.0.6"
    )
    without = judged({"attune_int8": None})
    ours = {
        aim: verdict for aim, verdict in without.items() if aim.startswith("attune_int8") and "first use" not in aim
    }
    assert ours and all(verdict.startswith("not measured: ") for verdict in ours.values()), ours
    nothing = list(AIMS.verdicts([], {}, {}, H200))
    assert nothing and all(each["verdict"].startswith("not measured") for each in nothing)
    slow = judged(first={"attune_int8": 20.5, "attune_bf16": "the first use of attune_bf16 failed"})
    assert slow["attune_int8: seconds of the first use any"] == "missed"
    assert slow["attune_bf16: seconds of the first use any"].startswith("not measured: the first use")


def test_speeds_are_judged_on_an_h200_only() -> None:
    elsewhere = judged(gpu="NVIDIA GeForce RTX 4090")
    for aim, verdict in elsewhere.items():
        assert verdict.startswith("no verdict") is any(word in aim for word in ("TOPS", "as fast")), (aim, verdict)
    assert not any("met" in verdict.split() for verdict in judged(gpu=AIMS.DRY).values())


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_the_whole_program_runs_on_a_cpu_and_claims_nothing(tmp_path) -> None:
    file = tmp_path / "ä b.json"
    options = ["--dry", "--rounds", "1", "--tiles", "--shapes", "wan-32760", "--json", str(file)]
    program = [sys.executable, str(PROGRAM), *options]
    done = subprocess.run(program, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text("utf-8"))
    assert {"attune_int8", "attune_bf16", "sdpa"} <= {each["kernel"] for each in result["rows"]}
    assert any(each["kernel"].startswith("int8 ") for each in result["rows"])
    assert "needs a cuda device" in result["left_out"]["wan-32760"]["sage1"]
    assert result["machine"]["gpu"] == AIMS.DRY
    assert all(each["verdict"].startswith(("not measured", "no verdict")) for each in result["verdicts"])
    assert "Aims:" in done.stdout and "sage1: left out: " in done.stdout
