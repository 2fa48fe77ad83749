"""Our kernels compiled for GPUs that are not here: benchmarks/static/ still says what the compiler makes of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from comfyui_attune.kernels.int8 import tiles
from support.interpreter import WHY_NOT
from support.loading import ROOT

_spec = importlib.util.spec_from_file_location("attune_int8_static", ROOT / "benchmarks" / "int8_static.py")
assert _spec and _spec.loader
STATIC: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(STATIC)
REPORTS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(STATIC.REPORTS.glob("sm_*.json"))}
# Compiled again by this test. The others take some minutes: `python benchmarks/int8_static.py --write`.
AGAIN = [
    *((target, "attend-128") for target in STATIC.TARGETS),
    *(("sm_90", case) for case in ("attend-64", "attend-128-mask", "quantise-128", "statistics-128")),
    *(("sm_90", "exact-64"), ("sm_90", "exact-128"), ("sm_80", "exact-128")),
]
# What a change may cost before this test asks for a look, and for reports to be written again.
REGISTERS, INSTRUCTIONS, SHARED = 8, 1.02, 1.1
# Bytes that a program may have, in KiB: the CUDA programming guide, "Compute Capabilities".
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def every(target: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, report) of each case and tile."""
    for name, found in REPORTS[target]["kernels"].items():
        for each in (found, *found.get("others", ())):
            yield f"{name} {each['tile']}", each


def mends_sums(loop: dict[str, Any], keys: int) -> bool:
    """Does each block's product of e4m3 start from zero, to be added up in float32? An instruction has 32 keys."""
    return loop["e4m3"] > 0 and loop["fresh"] * keys == loop["e4m3"] * 32


def test_every_shipped_tile_has_its_report() -> None:
    assert set(REPORTS) == set(STATIC.TARGETS) == set(SHARED_LIMIT)
    for target, report in REPORTS.items():
        assert tuple(report["kernels"]) == STATIC.CASES, target
        for name in STATIC.SHIPPED:
            first = report["kernels"][name]
            told = [(each["tile"], each["warps"]) for each in (first, *first["others"])]
            shipped = STATIC.candidates(name, target)
            assert len(shipped) == len(set(shipped))
            for (sizes, warps), tile in zip(told, shipped, strict=True):
                fields = asdict(tile)
                assert warps == tile.warps, (target, name)
                assert all(size == fields[key.lower()] for key, size in sizes.items()), (target, name, tile)


def test_gpus_without_a_report_take_the_tiles_of_one_that_has() -> None:
    like = {(8, 7): (8, 0), (10, 3): (10, 0), (12, 1): (12, 0)}
    for table in (tiles.INT8, tiles.SHORT, tiles.EXACT):
        for gpu, known in like.items():
            for width in tiles.WIDTHS:
                for masked in (False, True):
                    found = tiles.candidates_for(table, gpu, width, masked)
                    assert found == tiles.candidates_for(table, known, width, masked)
                    assert found[0] == tiles.tile_for(table, gpu, width, masked)


@pytest.mark.parametrize("target", STATIC.TARGETS)
def test_no_loop_touches_local_memory_and_every_tile_fits_the_gpu(target: str) -> None:
    for name, found in every(target):
        assert found["loop"].get("spills", 0) == 0, name
        assert found["stack"] <= 64, name  # around the loop, once
        assert found["shared"] <= SHARED_LIMIT[target] << 10, name


@pytest.mark.parametrize("target", STATIC.TARGETS)
def test_keys_and_values_are_read_and_written_in_wide_pieces(target: str) -> None:
    for name, found in every(target):
        if "mask" not in name:
            assert found["narrow"] == 0, name


@pytest.mark.parametrize("target", STATIC.TARGETS)
def test_each_block_of_keys_gets_a_fresh_sum(target: str) -> None:
    checked = 0
    for name, found in every(target):
        if found["tile"].get("FP8") and "BN" in found["tile"]:
            assert mends_sums(found["loop"], found["tile"]["BN"]), name
            checked += 1
    assert checked >= 6 or target in ("sm_80", "sm_86")  # those have no e4m3


@needs_compiler
@pytest.mark.parametrize("target", ("sm_89", "sm_90", "sm_100"))  # each has other instructions
def test_a_sum_of_a_product_would_be_seen(target: str, tmp_path, monkeypatch) -> None:
    """The plain way of writing it, which Triton turns into one sum for all blocks everywhere but on Hopper."""
    import triton

    from comfyui_attune.kernels.int8 import forward

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plain = tmp_path / "plain.py"
    text = (ROOT / "kernels" / "int8" / "forward.py").read_text("utf-8")
    fused = "tl.fma(acc, shrink[:, None], tl.dot(relabel_keys(to_e4m3(weights, EMULATE), BM, BN), v))"
    assert text.count(fused) == 1
    text = text.replace(fused, "acc * shrink[:, None] + tl.dot(relabel_keys(to_e4m3(weights, EMULATE), BM, BN), v)")
    plain.write_text(text, "utf-8")
    spec = importlib.util.spec_from_file_location("comfyui_attune.kernels.int8.plain", plain)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module.attend, triton.JITFunction)
    monkeypatch.setattr(forward, "attend", module.attend)
    found = STATIC.report("attend-128", target)
    assert mends_sums(found["loop"], found["tile"]["BN"]) is (target == "sm_90")


def test_on_hopper_exponentials_run_under_matrix_instructions() -> None:
    """Of the 66 of a block (64 weights, 2 rows) four fifths; half with 64 channels, where products are short."""
    kernels = REPORTS["sm_90"]["kernels"]
    assert kernels["attend-128"]["loop"]["overlapped"] >= 50
    assert kernels["attend-64"]["loop"]["overlapped"] >= 28
    assert kernels["attend-128-mask"]["loop"]["overlapped"] >= 28  # of 34
    assert kernels["attend-64-mask"]["loop"]["overlapped"] >= 16  # of 34
    assert kernels["exact-64"]["loop"]["overlapped"] >= 50  # of 66
    assert kernels["exact-128"]["loop"]["overlapped"] >= 32  # of 34
    assert kernels["exact-128-mask"]["loop"]["overlapped"] >= 20  # of 34
    assert {matrix.rpartition(".m64")[0] for matrix in kernels["attend-128"]["matrix"]} == {
        "wgmma.mma_async.sync.aligned"
    }


def test_scores_are_multiplied_in_8_bits_and_values_in_what_the_gpu_has() -> None:
    values = {"sm_80": "f32.f16.f16", "sm_86": "f32.f16.f16", "sm_100": "tcgen05.mma.cta_group::1.kind::f8f6f4"}
    for target, report in REPORTS.items():
        matrix = " ".join(report["kernels"]["attend-128"]["matrix"])
        assert "s32.s8.s8" in matrix, target
        assert values.get(target, "f32.e4m3.e4m3") in matrix, target


@needs_compiler
def test_a_masks_nan_is_not_cut_away(tmp_path, monkeypatch) -> None:
    """The interpreter's clamp hands NaN on in any case, so what is looked at is what a GPU would run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    STATIC.report("attend-128-mask-float", "sm_90", assembly=tmp_path)
    ptx = next(tmp_path.glob("*.ptx")).read_text("utf-8")
    clamps = [line for line in ptx.splitlines() if ".xorsign" in line]  # between -x and x in one instruction
    assert clamps
    assert all(".NaN." in line for line in clamps)


@needs_compiler
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
    assert found["narrow"] <= was["narrow"], again
    loop: dict[str, Any] = found["loop"]
    assert loop["spills"] <= was["loop"]["spills"], again
    assert loop["fresh"] == was["loop"]["fresh"], again
    assert loop["overlapped"] >= was["loop"]["overlapped"] - 2, f"{loop['order']}: {again}"
    assert loop["instructions"] <= was["loop"]["instructions"] * INSTRUCTIONS, again
