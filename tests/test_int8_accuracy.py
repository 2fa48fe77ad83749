"""How exact attune_int8 is: the arithmetic itself at every length, and the kernel where it can run.

Lengths that the interpreter cannot do are held by the same arithmetic in PyTorch (support/int8_recipes.py), which the
kernel is compared with where it can; on a GPU the kernel does them all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from comfyui_attune.attention.errors import Errors, make_inputs, measure_errors
from support.int8_recipes import KINDS, attune_int8, exact, make_case, sage2
from support.interpreter import WHY_NOT, Interpreter

LENGTHS = (1024, 8192, 32_768, 75_600)
QUERIES = 64
# (cosine at least, relative L1 and L2 at most). Values that are noise leave e4m3 no more than 3 to 4 %.
ALIKE, NOISE = (0.9999, 0.010, 0.012), (0.999, 0.045, 0.045)


def hold(found: Errors, kind: str) -> None:
    cosine, l1, l2 = NOISE if kind == "normal" else ALIKE
    assert found.cosine >= cosine and found.l1 <= l1 and found.l2 <= l2, found


@functools.lru_cache(maxsize=1)
def case(kind: str, length: int) -> tuple[torch.Tensor, ...]:
    q, k, v = make_case(kind, QUERIES, length)
    return q, k, v, exact(q, k, v)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_arithmetic_is_exact_enough_and_no_worse_than_sageattention_2s(kind: str, length: int) -> None:
    q, k, v, wanted = case(kind, length)
    ours = measure_errors(attune_int8(q, k, v), wanted)
    theirs = measure_errors(sage2(q, k, v), wanted)
    hold(ours, kind)
    assert ours.l2 <= 1.1 * theirs.l2 and ours.l1 <= 1.1 * theirs.l1


@pytest.mark.parametrize("kind", KINDS)
def test_errors_do_not_grow_with_the_length(kind: str) -> None:
    short, long = (
        measure_errors(attune_int8(q, k, v), wanted).l2 for q, k, v, wanted in (case(kind, n) for n in (8192, 75_600))
    )
    assert long <= 1.3 * short


@pytest.mark.parametrize("length", (1024, 8192))
@pytest.mark.parametrize("kind", KINDS)
def test_values_in_16_bits_are_more_exact_by_far(kind: str, length: int) -> None:
    """As on GPUs without e4m3."""
    q, k, v, wanted = case(kind, length)
    assert measure_errors(attune_int8(q, k, v, fp8=False), wanted).l2 <= 0.01


@pytest.mark.parametrize("part", ["turned", "smooth_v", "k_group"])
def test_every_part_of_the_recipe_earns_its_place(part: str) -> None:
    """Where it helps, leaving it out costs a fifth of the error at least; docs/int8.md has the figures."""
    kind, without = {
        "turned": ("spike_k", {"turned": 0}),
        "smooth_v": ("bias_v", {"smooth_v": "no"}),
        "k_group": ("spike_k", {"k_group": 128}),
    }[part]
    q, k, v, wanted = case(kind, 8192)
    # fp16 for V, where it is not V that is asked about: it would hide what happens to scores.
    fp8 = part == "smooth_v"
    whole, less = (measure_errors(attune_int8(q, k, v, fp8=fp8, **changes), wanted).l2 for changes in ({}, without))
    assert less >= 1.2 * whole


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    child = Interpreter()
    yield child
    child.stop()


@pytest.mark.parametrize(("kind", "fp8"), [*((kind, True) for kind in KINDS), ("spike_k", False)])
def test_the_kernel_does_this_arithmetic(interpreter: Interpreter, kind: str, fp8: bool) -> None:
    """Single numbers may fall on the other side of a half; the errors are the same."""
    q, k, v, wanted = case(kind, 1024)
    tile = {"bn": 128, "fp8": fp8}
    out = interpreter.attend("attune_int8", *(t.transpose(1, 2) for t in (q, k, v)), tile=tile).transpose(1, 2)
    recipe = attune_int8(q, k, v, fp8=fp8)
    ours, theirs = measure_errors(out, wanted).l2, measure_errors(recipe, wanted).l2
    assert measure_errors(out, recipe).l2 <= 0.3 * theirs
    assert ours == pytest.approx(theirs, rel=0.05)
    hold(measure_errors(out, wanted), kind)


@pytest.mark.parametrize("kind", ("structured", "bias_k", "bias_v", "spike_k", "normal"))
def test_the_declared_tolerance_is_twice_what_the_arithmetic_gives(kind: str) -> None:
    """On the inputs that `attune doctor` proves kernels with, whose values are noise."""
    from comfyui_attune.kernels import KERNELS

    (kernel,) = (kernel for kernel in KERNELS if kernel.name == "attune_int8")
    q, k, v = make_inputs(1, 2, 64, 2048, 128, kind=kind)
    error = measure_errors(attune_int8(q, k, v), exact(q, k, v)).l2
    assert 2 * error <= min(kernel.tolerance.values())
