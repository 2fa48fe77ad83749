"""Broken kernels in a real ComfyUI: the picture is the host's own, and the record says what happened.

One server, in which stand-ins run as kernels; what is wrong with them is written to a file before each prompt.
"""

from __future__ import annotations

import itertools
import json

import numpy
import pytest
import torch
from PIL import Image

from support import prompts
from support.loading import ROOT
from support.server import find_nodes
from support.standins import environment
from support.workflows import small

SAGE, SAGE_16 = "sage2_fp8_cuda", "sage2_fp16_cuda"  # tolerances 0.07 and 0.04, see kernels/sage.py
NAN = f"{SAGE}:nan:from=0"
NOT_FINITE = "gave NaN or infinity"
# A stand-in computes in float16, the host on the CPU in float32: what that makes of a latent, relative to its largest
# number. Seen: 6e-5 to 4e-4.
HALF = 2e-3


class Bench:
    """The server, and what is wrong with its kernels. A patch puts a node behind the model of a prompt."""

    def __init__(self, server, home, faults):
        self.server, self.failures, self.faults = server, home / "failures.json", faults
        self._ids = itertools.count(1000)  # the host runs a node of ours with a new id anew

    def wrong(self, fault: str) -> None:
        """From now on `fault` is what is wrong, and nothing is known of it."""
        self.faults.write_text(fault, "utf-8")
        self.failures.unlink(missing_ok=True)

    def select(self, kernel: str = SAGE, **inputs):
        return lambda prompt, model, _: prompts.selector(prompt, model, str(next(self._ids)), kernel, **inputs)

    def rule(self, kernel: str, **inputs):
        return lambda prompt, model, _: prompts.rule(prompt, model, str(next(self._ids)), kernel, **inputs)

    def node(self, class_type: str, **inputs):
        return lambda prompt, model, _: prompts.behind(prompt, model, str(next(self._ids)), class_type, **inputs)

    def run(self, make, *patches):
        """Run `make(patch)` with the nodes of `patches` one behind the other."""

        def patch(prompt, model, stage):
            for one in patches:
                model = one(prompt, model, stage)
            return model

        return self.server.run(make(patch))

    def exact(self, make, *patches):
        """The latent that `make` gives on the host's own attention."""
        return prompts.latent(self.run(make, *patches, self.select("host")))


@pytest.fixture(scope="module")
def bench(make_server, tmp_path_factory):
    home = tmp_path_factory.mktemp("proved")
    faults = home / "faults.txt"
    env = {**environment(home, "sage2", fault_file=faults, fast=SAGE_16), "OMP_NUM_THREADS": "1", "ATTUNE_TUNE": "off"}
    server = make_server(env=env, packs=(ROOT / "tests" / "fixture_packs" / "odd_nodes",), folder="broken")
    bench = Bench(server, home, faults)
    for kernel in (SAGE, SAGE_16):  # the doctor finds them good
        assert observed(bench.run(flux, bench.select(kernel))) == [{kernel: 12}]
    yield bench
    server.stop()


def wan(patch):
    """Two stages of two steps on models of one kind. Two blocks with self and cross attention: 4 calls a forward."""
    return prompts.two_stage(patch, size=32)


def flux(patch, **inputs):
    """Three steps of 4 blocks with one call each."""
    return prompts.picture("flux", patch, **inputs)


def split(patch):
    """The two conditionings are of lengths that do not go together: each has a forward of its own."""
    return flux(patch, negative="blurred " * 400)


def heun(patch):
    """Two forwards a step, but for the last."""
    return flux(patch, sampler="heun")


def sd3(patch, **inputs):
    """Three steps of 2 blocks with one call each; the model does not tell its blocks' numbers."""
    return prompts.picture("sd3", patch, **inputs)


def ancestral(patch):
    return sd3(patch, sampler="dpmpp_2s_ancestral")


def sd15(patch, **inputs):
    """Two steps of 3 blocks with two calls each."""
    return prompts.picture("sd15", patch, size=32, steps=2, **inputs)


def control(patch):
    return sd15(patch, control=True)


def distance(result, exact) -> float:
    """The largest difference of two latents, relative to the largest number; NaN where one is not finite."""
    return float((prompts.latent(result) - exact).abs().max() / exact.abs().max())


def repeats(result) -> list[int]:
    return [run["repeated"] for run in result.runs]


def observed(result) -> list[dict]:
    return [run["observed"] for run in result.runs]


def notes(result) -> str:
    return "\n".join(note for run in result.runs for note in run["notes"])


def text(result) -> str:
    """What stands on the first node of the last run."""
    return next(iter(result.runs[-1]["nodes"].values()))["text"]


# NaN and infinity


def frames(result) -> torch.Tensor:
    """The frames of a video, before they were encoded: ComfyUI's encoder does not give the same file every time."""
    pictures = sorted(file for file in result.files if file.suffix == ".png")
    assert len(pictures) == 5 and any(file.suffix == ".mp4" for file in result.files)
    return torch.stack([torch.from_numpy(numpy.array(Image.open(file))) for file in pictures])


def test_a_broken_kernel_gives_the_video_of_host(bench):
    prompt = small(bench.server, bench.server.load("wan2.2_t2v_14b"), seed=7, steps=4, latents=False)
    (decoded,) = find_nodes(prompt, "VAEDecode")
    prompt["frames"] = prompts.node("SaveImage", images=[decoded, 0], filename_prefix="tests/frame")
    selectors = find_nodes(prompt, "AttentionSelector")
    results = []
    for kernel, fault in (("host", ""), (SAGE, NAN)):
        bench.wrong(fault)
        for selector in selectors:
            prompt[selector]["inputs"]["kernel"] = kernel
        results.append(bench.server.run(prompt))
    assert len(selectors) == 2 and repeats(results[1]) == [2, 0]  # the long negative prompt has forwards of its own
    exact, healed = map(frames, results)
    assert torch.equal(healed, exact) and exact.float().std() > 1  # and it is no grey area


@pytest.mark.parametrize(
    ("make", "calls"), [(wan, 8), (flux, 12), (heun, 20), (sd3, 6), (ancestral, 10), (sd15, 12), (control, 12)]
)
def test_nan_in_every_call_is_healed_once_and_remembered(bench, make, calls):
    bench.wrong(NAN)
    exact = bench.exact(make)
    first, second = bench.run(make, bench.select()), bench.run(make, bench.select())
    assert torch.equal(prompts.latent(first), exact) and torch.equal(prompts.latent(second), exact)
    assert sum(repeats(first)) == 1 and sum(repeats(second)) == 0
    assert {frozenset(kernels.items()) for kernels in observed(first) + observed(second)} == {
        frozenset({"host": calls}.items())
    }
    where = "a block with no number" if make in (sd3, ancestral) else "block 0"
    assert f"{SAGE} {NOT_FINITE} in {where} (self attention, " in notes(first)
    assert notes(second) == "" and f"not {SAGE} ×{calls}: {NOT_FINITE} in an earlier run" in text(second)
    remarks = bench.server.get("/attune/machine")["remarks"]
    (said,) = (one for one in remarks if one.startswith(f"{SAGE}: {NOT_FINITE}"))
    assert "`attune cache clear --verdicts`" in said and "is not used there any more" in said


def test_the_controlnet_takes_part(bench):
    assert not torch.equal(bench.exact(control), bench.exact(sd15))


@pytest.mark.parametrize("make", [wan, sd3])
def test_infinity_in_one_row_of_one_head_is_seen(bench, make):
    bench.wrong(f"{SAGE}:inf_row:from=0")
    healed = bench.run(make, bench.select())
    assert torch.equal(prompts.latent(healed), bench.exact(make)) and repeats(healed)[0] == 1
    assert NOT_FINITE in notes(healed)


def test_nan_from_a_call_on(bench):
    """The first forward is the kernel's, the second is repeated, and then the kernel is not used any more."""
    bench.wrong(f"{SAGE}:nan:from=6")
    healed = bench.run(wan, bench.select())
    assert repeats(healed) == [1, 0] and observed(healed) == [{SAGE: 4, "host": 4}, {"host": 8}]
    bench.wrong("")

    def only_in_the_first_step(prompt, model, stage):
        return model if stage else bench.rule(SAGE, to_percent=1)(prompt, model, stage)

    expected = bench.run(wan, bench.select("host"), only_in_the_first_step)
    assert observed(expected) == [{SAGE: 4, "host": 4}, {"host": 8}]
    assert torch.equal(prompts.latent(healed), prompts.latent(expected))
    assert 0 < distance(healed, bench.exact(wan)) < HALF


@pytest.mark.parametrize(
    ("make", "block", "kind", "there", "elsewhere"),
    [(wan, 1, "both", 4, 4), (wan, 1, "cross", 2, 6), (flux, 3, "both", 3, 9)],
)
def test_nan_in_one_block_takes_the_kernel_from_that_block_alone(bench, make, block, kind, there, elsewhere):
    bench.wrong(f"{SAGE}:nan:block={block}" + (f",kind={kind}" if kind != "both" else ""))
    first, second = bench.run(make, bench.select()), bench.run(make, bench.select())
    assert sum(repeats(first)) == 1 and sum(repeats(second)) == 0
    assert f"{SAGE} {NOT_FINITE} in block {block} ({'cross' if kind == 'cross' else 'self'} attention" in notes(first)
    assert observed(second)[-1] == {"host": there, SAGE: elsewhere}
    bench.wrong("")
    but_there = (bench.select(), bench.rule("host", blocks=str(block), kind=kind))
    assert torch.equal(prompts.latent(second), prompts.latent(bench.run(make, *but_there)))

    def repeated(prompt, model, stage):
        return model if stage else bench.rule("host", to_percent=1)(prompt, model, stage)

    assert torch.equal(prompts.latent(first), prompts.latent(bench.run(make, *but_there, repeated)))


def test_nan_that_does_not_come_again_costs_one_forward(bench):
    bench.wrong(f"{SAGE}:nan:call=5")
    healed = bench.run(wan, bench.select())
    assert distance(healed, bench.exact(wan)) < HALF
    assert repeats(healed) == [1, 0] and observed(healed) == [{SAGE: 4, "host": 4}, {SAGE: 8}]
    assert "did not happen again" in notes(healed) and not bench.failures.exists()


# How far off a kernel may be


@pytest.mark.parametrize(
    ("kernel", "inputs", "size", "limit"),
    [
        (SAGE, {}, 0.01, None),
        (SAGE, {}, 0.06, None),
        (SAGE, {"error_budget": 0.01}, 0.06, None),  # the budget is for what `auto` chooses
        (SAGE, {}, 0.5, "0.07"),
        (SAGE_16, {}, 0.06, "0.04"),
        ("auto", {"precision": "fast"}, 0.01, None),
        ("auto", {"precision": "fast"}, 0.06, "0.05"),
        ("auto", {"precision": "fast", "error_budget": 0.1}, 0.06, None),
    ],
)
def test_a_kernel_may_be_off_by_so_much(bench, kernel, inputs, size, limit):
    name = SAGE if kernel == SAGE else SAGE_16
    bench.wrong(f"{name}:error={size}:from=0")
    result = bench.run(wan, bench.select(kernel, **inputs))
    apart = distance(result, bench.exact(wan))
    if limit is None:
        assert repeats(result) == [0, 0] and observed(result) == [{name: 8}] * 2 and "off by" not in notes(result)
        assert apart > HALF  # nothing was healed
        return
    assert repeats(result) == [1, 0] and not any(name in kernels for kernels in observed(result))
    assert apart < 1e-5  # `auto` goes on with sdpa, in float32
    figure = "L1" if kernel == "auto" else "L2"
    assert f"(relative {figure} against float32), allowed: {limit} in block 0 (self" in notes(result)
    assert sum(repeats(bench.run(wan, bench.select(kernel, **inputs)))) == 0  # it is remembered


def test_no_budget_means_exact_kernels_only(bench):
    bench.wrong(f"{SAGE_16}:error=0.01:from=0")
    assert observed(bench.run(wan, bench.select("auto", precision="fast", error_budget=0.0))) == [{"sdpa": 8}] * 2


# Kernels that raise


def test_a_kernel_that_raises_now_and_then(bench):
    bench.wrong(f"{SAGE}:raise:odd")
    result = bench.run(wan, bench.select())
    assert distance(result, bench.exact(wan)) < HALF and sum(repeats(result)) == 0
    assert "raised RuntimeError: stand-in fault of sage2_fp8_cuda in call 1" in notes(result)


def test_a_user_who_wants_an_error_gets_one_that_says_why(bench):
    from support.server import PromptFailedError

    bench.wrong(NAN)
    with pytest.raises(PromptFailedError, match=f"asked to run on {SAGE} only(.|\n)*{NOT_FINITE}"):
        bench.run(flux, bench.select(when_unavailable="error"))


# What else happens around a forward


def test_conditionings_in_forwards_of_their_own(bench):
    bench.wrong(NAN)
    healed = bench.run(split, bench.select())
    assert torch.equal(prompts.latent(healed), bench.exact(split))
    assert repeats(healed) == [2] and healed.runs[0]["forwards"] == 6  # two shapes, each found once


def test_a_step_of_two_forwards_that_breaks_in_the_second(bench):
    bench.wrong(f"{SAGE}:nan:from=5")
    healed = bench.run(heun, bench.select())
    assert repeats(healed) == [1] and observed(healed) == [{SAGE: 4, "host": 16}]
    assert 0 < distance(healed, bench.exact(heun)) < HALF


@pytest.mark.parametrize("first", ["LoRA", "selector"])
def test_a_lora(bench, first):
    bench.wrong(NAN)
    lora = bench.node("LoraLoaderModelOnly", lora_name="flux.safetensors", strength_model=1.0)
    nodes = [lora, bench.select()]
    healed = bench.run(flux, *(nodes if first == "LoRA" else reversed(nodes)))
    exact = bench.exact(flux, lora)
    assert torch.equal(prompts.latent(healed), exact) and not torch.equal(exact, bench.exact(flux))
    assert repeats(healed) == [1]


def hooked(patch):
    """A LoRA on one conditioning only, by hooks whose strength changes half-way: forwards with other weights."""
    prompt = flux(patch)
    prompt["40"] = prompts.node("CreateHookLoraModelOnly", lora_name="flux.safetensors", strength_model=1.0)
    prompt["41"] = prompts.node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    prompt["42"] = prompts.node("CreateHookKeyframe", strength_mult=0.3, start_percent=0.5, prev_hook_kf=["41", 0])
    prompt["43"] = prompts.node("SetHookKeyframes", hooks=["40", 0], hook_kf=["42", 0])
    prompt["44"] = prompts.node(
        "ConditioningSetProperties", cond_NEW=["5", 0], strength=1.0, set_cond_area="default", hooks=["43", 0]
    )
    prompt["12"]["inputs"]["positive"] = ["44", 0]
    return prompt


def test_hooks(bench):
    bench.wrong(NAN)
    healed, exact = bench.run(hooked, bench.select()), bench.exact(hooked)
    assert torch.equal(prompts.latent(healed), exact) and not torch.equal(exact, bench.exact(flux))
    assert repeats(healed) == [1]


@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("first", ["cache", "selector"])
def test_a_cache_of_results_never_keeps_one_that_is_not_healed(bench, cache, first):
    def long(patch):
        return flux(patch, steps=6)

    bench.wrong(NAN)
    cache = bench.node(cache, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
    nodes = [cache, bench.select()]
    healed = bench.run(long, *(nodes if first == "cache" else reversed(nodes)))
    exact = bench.exact(long, cache)
    assert torch.equal(prompts.latent(healed), exact) and not torch.equal(exact, bench.exact(long))
    assert repeats(healed) == [1] and observed(healed)[0]["host"] < 6 * 4  # it left out some steps


def test_a_wrapper_that_the_model_never_runs(bench):
    """EasyCache wraps the network, and SD3 runs no such wrappers."""
    bench.wrong(NAN)
    cache = bench.node("EasyCache", reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
    healed = bench.run(sd3, bench.select(), cache)
    assert torch.equal(prompts.latent(healed), bench.exact(sd3)) and repeats(healed) == [1]


@pytest.mark.parametrize("forward", [0, 1, 2], ids=["first try", "repeat", "search for the culprit"])
def test_a_stop_in_the_middle_of_a_forward(bench, forward):
    bench.wrong(NAN)
    stopped = bench.run(flux, bench.node("StopInForward", forward=forward), bench.select())
    assert stopped.history["status"]["messages"][-1][0] == "execution_interrupted"
    (run,) = stopped.runs
    assert run["status"] == "stopped"
    assert "no attention call of this model" not in notes(stopped)  # nobody can tell
    if forward:  # what was seen so far is kept
        assert run["repeated"] == 1
    after = bench.run(flux, bench.select())
    assert torch.equal(prompts.latent(after), bench.exact(flux))


@pytest.mark.parametrize("fault", ["nan:from=0", "nan:from=9", "error=0.5:from=0"])
def test_the_keys_that_an_autoregressive_model_keeps(bench, fault):
    """Every frame attends to one more, so each has calls of a new shape, found once. Each forward moves a pointer."""
    bench.wrong(f"{SAGE}:{fault}")
    healed, exact = bench.run(prompts.autoregressive, bench.select()), bench.exact(prompts.autoregressive)
    late = 8 if fault == "nan:from=9" else 0
    assert repeats(healed) == [3] and healed.runs[0]["forwards"] == 9
    assert healed.runs[0]["observed"].get(SAGE, 0) == late
    assert distance(healed, exact) < HALF if late else torch.equal(prompts.latent(healed), exact)


@pytest.mark.parametrize("how", ["a part is missing", "a number is none", "no JSON"])
def test_what_is_remembered_and_cannot_be_read_costs_nothing(bench, how):
    bench.wrong(NAN)
    exact = bench.exact(flux)
    bench.run(flux, bench.select())
    kept = json.loads(bench.failures.read_text("utf-8"))
    for entry in itertools.chain(*kept["state"].values()):
        if how == "a part is missing":
            del entry["around"]
        else:
            entry["place"]["block"] = [1]
    bench.failures.write_text("{" if how == "no JSON" else json.dumps(kept), "utf-8")
    healed = bench.run(flux, bench.select())
    assert torch.equal(prompts.latent(healed), exact) and repeats(healed) == [1]


def test_several_prompts_in_a_row_on_one_model(bench):
    """The nodes are cached, so one router sees them all; other pictures, of another size too."""
    bench.wrong(f"{SAGE}:nan:from=16")
    selected = bench.select()
    prompt = flux(selected)
    (selector,) = find_nodes(prompt, "AttentionSelector")

    def ask(kernel, seed, size):
        prompt[selector]["inputs"]["kernel"] = kernel
        prompt["12"]["inputs"]["seed"] = seed
        prompt["7"]["inputs"] |= {"width": size, "height": size}
        return bench.server.run(prompt)

    asked = [(1, 64), (2, 64), (3, 64), (4, 32), (5, 64)]
    results = [ask(SAGE, *one) for one in asked]
    assert all(selector in result.cached for result in results[1:])
    # Forward 5 goes wrong; a picture of another size has calls of another shape.
    assert [repeats(result) for result in results] == [[0], [1], [0], [1], [0]]
    for result, one in zip(results[2:], asked[2:], strict=True):
        assert torch.equal(prompts.latent(result), prompts.latent(ask("host", *one)))


# Where attention is not the cause


@pytest.mark.parametrize("fault", ["", NAN], ids=["healthy kernel", "broken kernel too"])
def test_a_lora_of_nan_is_not_blamed_on_the_kernel(bench, fault):
    bench.wrong(fault)
    lora = bench.node("LoraLoaderModelOnly", lora_name="nan.safetensors", strength_model=1.0)
    result = bench.run(wan, lora, bench.select())
    assert torch.equal(prompts.latent(result).isnan(), bench.exact(wan, lora).isnan())
    assert prompts.latent(result).isnan().all() and repeats(result) == [0, 0]
    assert "attention is not the cause" in notes(result) and not bench.failures.exists()


def test_a_latent_with_nan_is_not_blamed_on_the_kernel(bench):
    bench.wrong("")

    def spoilt(patch):
        prompt = flux(patch)
        prompt["15"] = prompts.node("NanLatent", samples=["7", 0])
        prompt["12"]["inputs"]["latent_image"] = ["15", 0]
        return prompt

    result = bench.run(spoilt, bench.select())
    assert torch.equal(prompts.latent(result).isnan(), bench.exact(spoilt).isnan())
    assert "attention is not the cause" in notes(result) and repeats(result) == [0]
    after = bench.run(flux, bench.select())
    assert distance(after, bench.exact(flux)) < HALF and observed(after) == [{SAGE: 12}] and notes(after) == ""


# The account


def test_a_run_of_one_forward_that_was_repeated_tells_so_on_its_node(bench):
    bench.wrong(NAN)

    def one_step(patch):
        return flux(patch, steps=1)

    healed = bench.run(one_step, bench.select())
    assert repeats(healed) == [1] and observed(healed) == [{"host": 4}]
    assert "no attention call came to this rule" not in text(healed)
