"""How our Triton kernels are launched: what Triton would do, without what it costs; and which tile is taken."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comfyui_attune.attention.kernel import Tuning
from comfyui_attune.attention.machine import CPU, Architecture, Device, Machine
from comfyui_attune.doctor.kernel_verdict import KernelVerdict
from comfyui_attune.doctor.probe import probe, use_choices
from comfyui_attune.kernels import KERNELS, with_extra
from comfyui_attune.kernels.int8 import tuning
from comfyui_attune.kernels.int8.tiles import INT8, Tile, candidates_for
from support.loading import ROOT
from support.no_gpu import WHY_NOT

CHILD = Path(__file__).parent / "support" / "launch_child.py"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    folder = tmp_path_factory.mktemp("libcuda")
    done = subprocess.run([sys.executable, str(CHILD), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", ["int8", "exact", "another length", "a mask"])
def test_a_repeated_call_launches_bit_for_bit_what_triton_would(launched: dict[str, Any], case: str) -> None:
    """Kernels, grids, threads, shared memory and every argument, as libcuda gets them."""
    found = launched["cases"][case]
    assert found["direct"] == found["triton"]
    kernels = [name for name, *_ in found["direct"]]
    assert kernels == (["collect_statistics", "quantise", "attend"] if case == "int8" else ["attend_exact"])
    assert found["kept"] == len(kernels)


@pytest.mark.parametrize("case", ["int8", "exact"])
def test_profilers_are_told_of_every_launch(launched: dict[str, Any], case: str) -> None:
    found = launched["cases"][case]
    assert found["watched"] == found["direct"]
    assert found["told"] == 3 * len(found["direct"])


def test_other_calls_get_other_arguments(launched: dict[str, Any]) -> None:
    parameters = {name: found["direct"][-1][:-1] for name, found in launched["cases"].items()}
    assert len({json.dumps(each) for each in parameters.values()}) == len(parameters)


def test_addresses_that_are_not_aligned_are_left_to_triton(launched: dict[str, Any]) -> None:
    """Which kernel is right depends on them, call by call."""
    found = launched["cases"]["not aligned"]
    assert found["direct"] == found["triton"] and found["kept"] == 0


def test_a_call_that_differs_in_one_thing_is_not_taken_for_the_one_that_is_kept(launched: dict[str, Any]) -> None:
    for name, found in launched["twins"].items():
        assert found["direct"] == found["triton"], name


GPU = "cuda:0"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """Every device is a GPU of sm_90, whose calls are made up."""
    monkeypatch.setattr(tuning, "capability_of", lambda _index: (9, 0))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_SHAPE", (1, 32, 2))
    tuning.tile_on.cache_clear()
    yield
    tuning.tile_on.cache_clear()


def taken(dim: int, masked: bool = False, index: int = 0, short: bool = False) -> Tile:
    return tuning.tile_on("attune_int8", index, dim, masked, short)


@pytest.mark.parametrize("gpu", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_values_stay_in_16_bits_where_keys_are_few(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "capability_of", lambda _index: gpu)
    tuning.tile_on.cache_clear()
    for dim, masked in itertools.product((64, 128, 256), (False, True)):
        assert not taken(dim, masked, short=True).fp8
        assert taken(dim).fp8 is (gpu >= (8, 9))
    tuning.tile_on.cache_clear()


def test_the_fastest_tile_is_found_and_then_taken(hopper) -> None:
    tiles = candidates_for(INT8, (9, 0), 128, False)
    assert len(tiles) > 1
    found, steps = refine({tiles[-1]: 0.5})
    assert found["128"] == str(tiles[-1])
    assert any(str(tiles[-1]) in step for step in steps)
    assert taken(128) == tiles[0]  # until it is said so
    tuning.use("attune_int8", GPU, found)
    assert taken(128) == tiles[-1]
    assert taken(96) == tiles[-1]  # padded to 128
    assert taken(128, masked=True) == candidates_for(INT8, (9, 0), 128, True)[0]
    assert taken(128, index=1) == tiles[0]  # the other GPU has not been asked


def test_what_gains_nothing_is_wrong_or_fails_is_not_taken(hopper) -> None:
    tiles = candidates_for(INT8, (9, 0), 128, False)
    assert refine({tiles[-1]: 0.99})[0]["128"] == str(tiles[0])
    assert refine({tiles[-1]: 0.5}, wrong=tiles[-1])[0]["128"] == str(tiles[0])
    assert refine({tiles[-1]: 0.5}, fails=tiles[-1])[0]["128"] == str(tiles[0])


def refine(
    share: dict[Tile, float], wrong: Tile | None = None, fails: Tile | None = None
) -> tuple[dict[str, str], list[str]]:
    """What refining gives where tiles take these shares of one millisecond."""

    def attend(q, k, v, tile):
        if tile == fails:
            raise RuntimeError("out of resource: shared memory")
        return q * (1.5 if tile == wrong else 1)

    steps: list[str] = []
    milliseconds = lambda call: share.get(call.args[3], 1.0)  # noqa: E731
    return tuning.refine("attune_int8", "cpu", 0.08, steps.append, attend, milliseconds), steps


def test_a_choice_that_is_not_shipped_any_more_is_passed_over(hopper) -> None:
    tuning.use("attune_int8", GPU, {"128": "Tile(bm=7, bn=7, warps=1, stages=1)", "64": "", "256": "nonsense"})
    assert taken(128) == candidates_for(INT8, (9, 0), 128, False)[0]
    tuning.use("attune_int8", "cpu", {"128": "anything"})


def test_our_triton_kernels_have_tiles_to_choose_from_and_an_origin() -> None:
    ours = {kernel.name: kernel for kernel in KERNELS if kernel.name.startswith("attune_")}
    assert ours and all(kernel.tuning and kernel.origin for kernel in ours.values())


def test_a_verdict_keeps_the_choice() -> None:
    verdict = KernelVerdict("works", choice={"128": "a tile"})
    assert KernelVerdict.from_json(json.loads(json.dumps(verdict.as_json()))) == verdict
    with pytest.raises(ValueError, match="choice"):
        KernelVerdict.from_json({"outcome": "works", "choice": ["a tile"]})


# What a kernel with configurations does in the doctor's child process.

TUNED = """
import os
from dataclasses import replace

from comfyui_attune.attention.kernel import Tuning
from comfyui_attune.kernels import KERNELS as PACKS

sdpa = next(kernel for kernel in PACKS if kernel.name == "sdpa")

def refine(device, say):
    say(step="a tile")
    if {fault!r} == "raises":
        raise RuntimeError("no room")
    if {fault!r} == "crashes":
        os.abort()
    return {{"128": f"the best on {{device}}"}}

KERNELS = (replace(sdpa, name="tuned", tuning=Tuning(refine, lambda device, choice: None)),)
"""


@pytest.mark.parametrize("fault", ["", "raises", "crashes"])
def test_the_child_refines_what_it_has_proved_and_a_fault_there_leaves_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    file = tmp_path / "tuned.py"
    file.write_text(TUNED.format(fault=fault), "utf-8")
    monkeypatch.setenv("ATTUNE_EXTRA_KERNELS", str(file))  # for the child
    kernels = {kernel.name: kernel for kernel in with_extra(str(file))}
    verdict = probe([kernels["tuned"]], Machine((CPU,)), ROOT)["tuned"]
    assert verdict.outcome == "works"
    assert verdict.choice == ({} if fault else {"128": "the best on cpu"})
    assert ("no room" in verdict.raw) is (fault == "raises")


def test_equal_cards_use_one_choice() -> None:
    told: list[tuple[str, Any]] = []
    tuning = Tuning(lambda _device, _say: {}, lambda device, choice: told.append((device, choice)))
    (kernel,) = (replace(kernel, tuning=tuning) for kernel in KERNELS if kernel.name == "attune_int8")
    card = Device("cuda:0", "a card", Architecture.ADA, (8, 9), 24 << 30)
    cards = (card, replace(card, name="cuda:1"), replace(card, name="cuda:2", title="another"))
    choice = {"128": "a tile"}
    use_choices({"attune_int8": kernel}, Machine(cards), card, {"attune_int8": KernelVerdict("works", choice=choice)})
    assert told == [("cuda:0", choice), ("cuda:1", choice)]
