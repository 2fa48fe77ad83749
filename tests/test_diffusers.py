"""attune.apply on diffusers pipelines: every attention call is routed, and nothing is left behind."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import comfyui_attune as attune
from comfyui_attune.attention.policy import BlockRange, Policy, Rule, UnknownKernelError
from support.loading import ROOT

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

import tiny_pipelines as pipelines
from controlvideo_modules import FullyFrameAttention, IndividualAttention, controlvideo_like

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and torch deprecate things of their own
SDPA = F.scaled_dot_product_attention
MAKERS = {
    "sd15": pipelines.sd15,
    "sd15+controlnet": pipelines.sd15_controlnet,
    "sd15+2 controlnets": lambda: pipelines.sd15_controlnet(2),
    "sdxl": pipelines.sdxl,
    "animatediff": pipelines.animatediff,
    "flux": pipelines.flux,
    "wan2.1": pipelines.wan,
    "wan2.2": lambda: pipelines.wan(True),
}


@pytest.fixture(autouse=True, scope="module")
def state(tmp_path_factory):
    """A state folder of its own, whatever other tests have used."""
    from comfyui_attune.pipelines import process

    before = os.environ.get("ATTUNE_HOME")
    os.environ["ATTUNE_HOME"] = str(tmp_path_factory.mktemp("home"))
    for cached in (process.verdicts, process._timings_of):
        cached.cache_clear()
    yield
    process.verdicts().stop()
    process.verdicts.cache_clear()
    os.environ.pop("ATTUNE_HOME")
    if before is not None:
        os.environ["ATTUNE_HOME"] = before


@pytest.fixture(autouse=True)
def nothing_remembered(state, monkeypatch, tmp_path):
    """What failed in one test counts for nothing in the next."""
    monkeypatch.setenv("ATTUNE_HOME", str(tmp_path))


@contextmanager
def counted_sdpa():
    """Counts the calls of SDPA that reach torch."""
    counts = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is SDPA:
                counts.append(tuple(args[0].shape) if args else ())
            return func(*args, **(kwargs or {}))

    with Counting():
        yield counts


def objects_of(pipe):
    """Everything a patched pipeline might have changed: which objects stand where."""
    found = {"class": type(pipe), "ours": [key for key in vars(pipe) if "attune" in key]}
    for name, model in vars(pipe).items():
        if isinstance(model, torch.nn.Module):
            for path, module in model.named_modules():
                for key, value in vars(module).items():
                    if not key.endswith(("feat_map", "conv_idx")):  # a run of Wan's VAE makes these anew
                        found[name, path, key] = id(value)
                for key, value in vars(getattr(module, "processor", None) or object).items():
                    found[name, path, "processor", key] = id(value)
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_every_call_of_a_pipeline_is_routed_and_nothing_is_left_behind(name):
    pipe, call = MAKERS[name]()
    with counted_sdpa() as made:
        before = pipelines.result(pipe, call)
    objects = objects_of(pipe)
    with attune.applied(pipe, "split") as handle:
        with counted_sdpa() as left:
            routed = pipelines.result(pipe, call)
        data = handle.data()
        assert not left, "calls of SDPA that were not routed"
        assert data[0]["observed"] == {"split": len(made)}
        assert f"Ran: split ×{len(made):,}" in handle.report()
    assert torch.allclose(before, routed, atol=1e-4)
    assert torch.isfinite(before).all() and before.std() > 0
    assert objects_of(pipe) == objects
    assert torch.equal(pipelines.result(pipe, call), before)
    steps = {step["step"] for step in data[0]["steps"]}
    assert steps == set(range(call["num_inference_steps"]))


def test_both_transformers_of_wan_22_take_part():
    pipe, call = pipelines.wan(True)
    with attune.applied(pipe, "split") as handle:
        calls = {"transformer": 0, "transformer_2": 0}
        for name in calls:
            getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        pipelines.result(pipe, call)
        assert handle.models == ["vae", "transformer", "transformer_2"] or set(handle.models) >= set(calls)
    assert all(calls.values())


def test_the_plain_host_gives_the_same_bits():
    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    with attune.applied(pipe, "host") as handle:
        assert torch.equal(pipelines.result(pipe, call), before)
        assert set(handle.data()[0]["observed"]) == {"host"}


def test_rules_by_block_and_kind():
    pipe, call = pipelines.flux()
    rules = Policy((Rule(("sdpa_math",)), Rule(("split",), blocks=BlockRange(1, 2))))
    with attune.applied(pipe, rules) as handle:
        pipelines.result(pipe, call)
        data = handle.data()[0]
    blocks = {(block, kernel) for pattern in data["patterns"] for block, _, kernel, _ in pattern}
    assert {(0, "sdpa_math"), (1, "split"), (2, "split")} <= blocks
    pipe, call = pipelines.sd15()
    with attune.applied(pipe, Policy((Rule(("sdpa",)), Rule(("split",), kind="cross")))) as handle:
        pipelines.result(pipe, call)
        kinds = {(kind, kernel) for pattern in handle.data()[0]["patterns"] for _, kind, kernel, _ in pattern}
    assert kinds == {("self", "sdpa"), ("cross", "split")}


@pytest.mark.parametrize("make", [pipelines.sd15, pipelines.wan, pipelines.flux])
def test_rules_by_percent_follow_the_schedule(make):
    pipe, call = make()
    call = {**call, "num_inference_steps": 4}
    if make is pipelines.flux:
        from diffusers import FlowMatchEulerDiscreteScheduler

        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    rules = Policy((Rule(("sdpa",)), Rule(("split",), to_percent=50)))
    with attune.applied(pipe, rules) as handle:
        pipelines.result(pipe, call)
        data = handle.data()[0]
    ran = {}
    for step in data["steps"]:
        ran[step["step"]] = {row[2] for number, _ in step["patterns"] for row in data["patterns"][number] if row[0]}
    assert ran[0] == {"split"}
    assert ran[3] == {"sdpa"}


def broken_kernel(spoil):
    """A kernel for the CPU under the name sage1: split, whose output `spoil(out, number of the call)` may ruin."""
    from comfyui_attune.pipelines.process import kernels

    split = kernels()["split"]
    calls = []

    def run(q, k, v, *, mask=None, scale=None):
        calls.append(q.shape)
        return spoil(split.load()(q, k, v, mask=mask, scale=scale), len(calls))

    return replace(split, name="sage1", needs_proof=True, load=lambda: run), calls


@pytest.mark.parametrize("name", ["sd15+controlnet", "wan2.2", "flux"])
def test_a_kernel_that_gives_nan_is_healed_per_step(name, monkeypatch):
    from comfyui_attune.pipelines import standing

    known = standing.kernels()
    pipe, call = MAKERS[name]()
    before = pipelines.result(pipe, call)
    broken, _ = broken_kernel(lambda out, number: out * math.nan if number > 4 else out)
    monkeypatch.setattr(standing, "kernels", lambda: {**known, "sage1": broken})
    with attune.applied(pipe, "sage1") as handle:
        healed = pipelines.result(pipe, call)
        data, text = handle.data()[0], handle.report()
    assert torch.allclose(before, healed, atol=1e-4)
    assert data["repeated"] >= 1
    assert any(event["kind"] == "demotion" and event["kernel"] == "sage1" for event in data["events"])
    assert "thrown away and done again" in text and "gave NaN or infinity" in text


def test_a_kernel_that_raises_is_done_without(monkeypatch):
    from comfyui_attune.pipelines import standing

    known = standing.kernels()
    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)

    def spoil(out, number):
        raise RuntimeError("CUDA error: invalid argument")

    broken, _ = broken_kernel(spoil)
    monkeypatch.setattr(standing, "kernels", lambda: {**known, "sage1": broken})
    with attune.applied(pipe, "sage1") as handle:
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert "raised RuntimeError: CUDA error: invalid argument" in handle.report()


def test_a_kernel_that_cannot_run_says_why():
    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    with attune.applied(pipe, "sage2_fp8_cuda") as handle:
        assert torch.equal(pipelines.result(pipe, call), before)
        text = handle.report()
    assert "Ran: host" in text and "not installed" in text


def test_auto_measures_and_keeps_to_the_host_meanwhile():
    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    with attune.applied(pipe) as handle:
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        data = handle.data()[0]
    assert data["policy"][0]["kernels"] == ["auto"]
    assert sum(data["observed"].values()) == 17


# Applied more than once, and on pipelines that others have changed


def test_applied_twice_the_last_decides_until_it_is_removed():
    pipe, call = pipelines.sd15()
    objects = objects_of(pipe)
    outer = attune.apply(pipe, "split")
    with attune.applied(pipe, "sdpa_math") as inner:
        pipelines.result(pipe, call)
        assert inner.data()[0]["observed"] == {"sdpa_math": 17}
    pipelines.result(pipe, call)
    assert [run["observed"] for run in outer.data()] == [{"sdpa_math": 17}, {"split": 17}]
    outer.remove()
    outer.remove()
    assert objects_of(pipe) == objects
    assert "split ×17" in outer.report()  # it tells of its runs afterwards, too


def test_removed_in_another_order():
    pipe, call = pipelines.sd15()
    objects = objects_of(pipe)
    first, second = attune.apply(pipe, "split"), attune.apply(pipe, "sdpa_math")
    first.remove()
    pipelines.result(pipe, call)
    assert second.data()[0]["observed"] == {"sdpa_math": 17}
    second.remove()
    assert objects_of(pipe) == objects


def test_two_pipelines_that_share_their_models():
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe, call = pipelines.sd15()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    objects = objects_of(pipe)
    more = {key: value for key, value in call.items() if key not in ("height", "width")}
    first = attune.apply(pipe, "split")
    second = attune.apply(other, "sdpa_math")
    other(**more, image=torch.rand(1, 3, 32, 32), strength=1.0)
    assert second.data()[0]["observed"] == {"sdpa_math": 18}  # an encoder's call more
    pipelines.result(pipe, call)  # the one that is called decides, not the one that was patched last
    assert first.data()[0]["observed"] == {"split": 17} and len(second.data()) == 1
    first.remove()
    other(**more, image=torch.rand(1, 3, 32, 32), strength=1.0)
    assert second.data()[1]["observed"] == {"sdpa_math": 18}
    second.remove()
    assert objects_of(pipe) == objects


def test_models_used_without_the_pipeline_are_covered_and_told_of():
    pipe, _ = pipelines.sd15()
    with attune.applied(pipe, "split") as handle, torch.no_grad():
        pipe.unet(torch.randn(1, 4, 16, 16), 5, torch.randn(1, 7, 16))
        assert handle.data()[0]["observed"] == {"split": 8}
        assert "outside calls of the pipeline" in handle.report()
    assert handle.data()[0]["observed"] == {"split": 8}


def test_a_lora_is_left_as_it_is():
    """peft, which diffusers needs for load_lora_weights, is not among the tests' packages: its layers are imitated."""
    pipe, call = pipelines.sd15()

    class LoraLinear(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, torch_seed = base, torch.manual_seed(3)
            del torch_seed
            self.down = torch.nn.Linear(base.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, base.out_features, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x))

    def add(unet):
        for module in list(unet.modules()):
            if hasattr(module, "get_attention_scores"):
                module.to_q = LoraLinear(module.to_q)

    plain = pipelines.result(pipe, call)
    with attune.applied(pipe, "split") as handle:
        add(pipe.unet)  # as load_lora_weights would, on a patched pipeline
        routed = pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 17}
    assert torch.allclose(routed, pipelines.result(pipe, call), atol=1e-4)
    assert not torch.allclose(routed, plain, atol=1e-4)


def test_offloading_hooks_before_and_after():
    """accelerate is not among the tests' packages: its way to hook a forward is imitated (add_hook_to_module)."""

    def hook(module):
        module._old_forward = module.forward
        module.forward = lambda *args, **kwargs: module._old_forward(*args, **kwargs)

    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    hook(pipe.unet)
    objects = objects_of(pipe)
    with attune.applied(pipe, "split") as handle:
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 17}
    assert objects_of(pipe) == objects
    pipe, call = pipelines.sd15()
    with attune.applied(pipe, "split") as handle:
        hook(pipe.unet)
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 17}
    assert torch.equal(pipelines.result(pipe, call), before)
    assert pipe.unet._old_forward.__func__ is type(pipe.unet).forward


def test_moved_to_another_type():
    pipe, call = pipelines.sd15()
    with attune.applied(pipe, "split") as handle:
        pipe.to(torch.bfloat16)
        narrow = {key: value.bfloat16() if isinstance(value, torch.Tensor) else value for key, value in call.items()}
        assert pipelines.result(pipe, narrow).dtype is torch.bfloat16
        assert handle.data()[0]["observed"] == {"split": 17}


def test_a_model_that_is_put_into_the_pipeline_later_is_covered_from_the_next_call_on():
    pipe, call = pipelines.sd15()
    with attune.applied(pipe, "split") as handle:
        pipe.unet = fresh = pipelines.unet()
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 17}
    assert "forward" not in vars(fresh)


def test_what_diffusers_asks_of_classes_is_answered_as_before(tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    with attune.applied(pipe, "split") as handle:
        kinds = {type(one) for one in pipe.unet.attn_processors.values()}
        assert kinds == {AttnProcessor2_0} and not kinds & {AttnProcessor}
        assert all(type(one) in (AttnProcessor2_0,) for one in pipe.unet.attn_processors.values())
        assert type(pipe) == StableDiffusionPipeline and isinstance(pipe, StableDiffusionPipeline)  # noqa: E721
        pipe.unet.set_default_attn_processor()  # asks for exact classes, and makes new objects
        pipe.save_pretrained(tmp_path)
        StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 17}
    assert json.loads((tmp_path / "model_index.json").read_text("utf-8"))["_class_name"] == "StableDiffusionPipeline"
    assert {type(one) for one in pipe.unet.attn_processors.values()} == {
        AttnProcessor
    }  # what the user has changed stays
    assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)


def test_pipelines_are_collected_when_nobody_needs_them():
    import weakref

    pipe, _ = pipelines.sd15()
    attune.apply(pipe, "split")
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None


def test_what_failed_in_a_pipeline_is_remembered(monkeypatch):
    from comfyui_attune.pipelines import standing

    known = standing.kernels()
    broken, calls = broken_kernel(lambda out, number: out * math.nan)
    monkeypatch.setattr(standing, "kernels", lambda: {**known, "sage1": broken})
    for again in (False, True):
        pipe, call = pipelines.sd15()
        with attune.applied(pipe, "sage1") as handle:
            pipelines.result(pipe, call)
            data = handle.data()[0]
        assert bool(data["repeated"]) is not again
    assert "in an earlier run with this model" in handle.report()
    made = len(calls)
    pipe, call = pipelines.sdxl()
    with attune.applied(pipe, "sage1"):
        pipelines.result(pipe, call)
    assert len(calls) > made  # another model


# Compiled


@pytest.mark.parametrize(
    "make, way",
    [(pipelines.sd15, "torch.compile"), (pipelines.flux, "model.compile"), (pipelines.flux, "blocks")],
)
def test_compiled_before_or_after(make, way):
    """With a full graph: nothing of ours breaks one. Eager as the compiler's back end: no C++ compiler is needed."""
    torch.compiler.reset()
    pipe, call = make()
    plain = pipelines.result(pipe, call)
    name = "transformer" if make is pipelines.flux else "unet"

    def compile_it():
        options = {"backend": "eager", "fullgraph": True}
        model = getattr(pipe, name)
        if way == "torch.compile":
            setattr(pipe, name, torch.compile(model, **options))
        for module in [model] if way == "model.compile" else model.modules() if way == "blocks" else ():
            if way == "model.compile" or type(module).__name__.endswith("TransformerBlock"):
                module.compile(**options)

    first = way != "blocks"
    if first:
        compile_it()
        pipelines.result(pipe, call)
    handle = attune.apply(pipe, "split")
    if not first:
        compile_it()
    assert torch.allclose(pipelines.result(pipe, call), plain, atol=1e-4)
    assert set(handle.data()[0]["observed"]) == {"split"}
    handle.remove()
    assert torch.allclose(pipelines.result(pipe, call), plain, atol=1e-6)
    assert len(handle.data()) == 1
    torch.compiler.reset()


def test_nan_in_a_compiled_model_is_healed(monkeypatch):
    from comfyui_attune.pipelines import standing

    torch.compiler.reset()
    known = standing.kernels()
    pipe, call = pipelines.flux()
    plain = pipelines.result(pipe, call)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    broken, _ = broken_kernel(lambda out, number: out * math.nan if number > 4 else out)
    monkeypatch.setattr(standing, "kernels", lambda: {**known, "sage1": broken})
    with attune.applied(pipe, "sage1") as handle:
        assert torch.allclose(pipelines.result(pipe, call), plain, atol=1e-4)
        assert handle.data()[0]["repeated"]
    torch.compiler.reset()


# Processors and modules of other kinds


def test_processors_that_make_score_tensors_are_routed_without_them():
    from diffusers.models.attention_processor import AttnProcessor

    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    pipe.unet.set_attn_processor(AttnProcessor())
    with attune.applied(pipe, "split") as handle, forbidden("baddbmm"):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == {"split": 17}


def test_slices_of_a_batch_are_routed():
    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    pipe.enable_attention_slicing(1)
    with attune.applied(pipe, "split") as handle, forbidden("baddbmm"):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"]["split"] > 17  # each slice is a call


@pytest.mark.parametrize("kernel", ["sdpa", "host"])
def test_what_a_kernel_calls_is_not_routed_again(kernel):
    from diffusers.models.attention_processor import AttnProcessor

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(AttnProcessor())
    with attune.applied(pipe, kernel) as handle:
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {kernel: 17}
    pipe, call = pipelines.sd15()
    controlvideo_like(pipe.unet)
    with attune.applied(pipe, kernel) as handle:
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {kernel: 17}


@contextmanager
def forbidden(name):
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            assert getattr(func, "__name__", "") != name, f"{name} was called"
            return func(*args, **(kwargs or {}))

    with Watch():
        yield


def test_scores_that_somebody_looks_at_are_computed():
    """Prompt-to-prompt and its kind keep or change the scores between softmax and values."""
    from diffusers.models.attention_processor import AttnProcessor

    seen = []

    class Looking(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (attn.head_to_batch_dim(f(x)) for f, x in
                       ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))  # fmt: skip
            scores = attn.get_attention_scores(q, k, attention_mask)
            seen.append(tuple(scores.shape))
            scores = scores * 0.5 + scores.roll(1, -1) * 0.5
            return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, v)))

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(Looking())
    before = pipelines.result(pipe, call)
    with attune.applied(pipe, "split") as handle:
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-5)
        assert any("Looking" in note for note in handle.notes)
    assert seen[0] == (4, 64, 64)


def test_scores_that_are_changed_in_place_are_the_ones_that_are_used():
    from diffusers.models.attention_processor import AttnProcessor

    class Editing(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (attn.head_to_batch_dim(f(x)) for f, x in
                       ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))  # fmt: skip
            scores = attn.get_attention_scores(q, k, attention_mask)
            scores[: len(scores) // 2] = scores[len(scores) // 2 :]
            scores *= 0.5
            scores.mul_(2.0)
            both = torch.cat([scores, scores])[: len(scores)]
            assert torch.equal(both, scores[:])
            return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, v)))

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(Editing())
    before = pipelines.result(pipe, call)
    with attune.applied(pipe, "split"):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-5)


def test_processors_of_others_are_wrapped_or_left_alone():
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Mine(AttnProcessor2_0):
        pass

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(Mine())
    with attune.applied(pipe, "split") as handle:
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 17}
        assert any("Mine" in note and "routed" in note for note in handle.notes)
        assert all(isinstance(one, Mine) for one in pipe.unet.attn_processors.values())
    with attune.applied(pipe, "split", foreign="leave") as handle:
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 1}  # the VAE's
        assert "left alone" in handle.report()


def test_an_ip_adapter_keeps_its_processors():
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe, _ = pipelines.sd15()
    for module in pipe.unet.modules():
        if getattr(module, "is_cross_attention", False) and hasattr(module, "get_attention_scores"):
            module.set_processor(IPAdapterAttnProcessor2_0(module.to_q.in_features, 16, num_tokens=(4,)))
    inputs = (torch.randn(1, 4, 16, 16), 5, (torch.randn(1, 7, 16), [torch.randn(1, 1, 4, 16)]))
    with torch.no_grad():
        before = pipe.unet(*inputs).sample
        with attune.applied(pipe, "split") as handle:
            assert torch.allclose(pipe.unet(*inputs).sample, before, atol=1e-4)
            assert handle.data()[0]["observed"]["split"] == 12  # 4 of self attention, 4 of cross attention twice
            assert any("IP-Adapter" in note for note in handle.notes)
        assert torch.equal(pipe.unet(*inputs).sample, before)


def test_a_pipeline_set_to_xformers_runs_without_it():
    from diffusers.models.attention_processor import XFormersAttnProcessor

    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    theirs = XFormersAttnProcessor()
    for module in pipe.unet.modules():
        if hasattr(module, "get_attention_scores"):
            module.processor = theirs
    with attune.applied(pipe, "split") as handle:
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert any("xformers" in note for note in handle.notes)
    assert all(one is theirs for one in pipe.unet.attn_processors.values())


def test_xformers_with_weights_of_its_own_is_left_alone():
    from diffusers.models.attention_processor import XFormersAttnAddedKVProcessor, XFormersAttnProcessor

    from comfyui_attune.pipelines.processors import without_xformers

    class Module:
        processor = XFormersAttnAddedKVProcessor()

    assert type(without_xformers(Module)).__name__ == "AttnAddedKVProcessor2_0"
    Module.processor = type("XFormersOfMine", (torch.nn.Module,), {})()
    assert without_xformers(Module) is None
    Module.processor, Module.scale_qk = XFormersAttnProcessor(), False
    assert without_xformers(Module) is None


def test_a_back_end_of_diffusers_stays_what_the_pipeline_falls_back_to():
    pipe, call = pipelines.wan()
    pipe.transformer.set_attention_backend("_native_math")
    try:
        before = pipelines.result(pipe, call)
        objects = objects_of(pipe)
        with attune.applied(pipe, "host") as handle:
            assert torch.equal(pipelines.result(pipe, call), before)
            assert set(handle.data()[0]["observed"]) == {"host"}
        assert objects_of(pipe) == objects
    finally:
        pipe.transformer.set_attention_backend("native")


def test_our_back_end_can_be_named_while_a_pipeline_is_patched():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    pipe, call = pipelines.flux()
    before, names = pipelines.result(pipe, call), list(AttentionBackendName)
    with attune.applied(pipe, "split") as handle:
        pipe.transformer.set_attention_backend("attune")
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"]["split"] == 7
        assert "attune" in [one.value for one in AttentionBackendName]
    assert list(AttentionBackendName) == names
    assert "attune" not in _AttentionBackendRegistry._backends
    assert _AttentionBackendRegistry._active_backend is AttentionBackendName.NATIVE


# ControlVideo-like: modules with their own `_attention`


def test_a_controlvideo_like_pipeline(monkeypatch):
    pipe, call = pipelines.sd15()
    assert controlvideo_like(pipe.unet) == 8
    before, objects = pipelines.result(pipe, call), objects_of(pipe)
    for module in pipe.unet.modules():
        if isinstance(module, (FullyFrameAttention, IndividualAttention)):
            module._use_memory_efficient_attention_xformers = True  # whose kernel is broken
            module._slice_size = 1
    with attune.applied(pipe, "split") as handle, forbidden("baddbmm"):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == {"split": 17}
        assert any("xformers" in note and "switched off" in note for note in handle.notes)
        assert any("slices" in note for note in handle.notes)
    for module in pipe.unet.modules():
        if isinstance(module, (FullyFrameAttention, IndividualAttention)):
            assert module._use_memory_efficient_attention_xformers is True and module._slice_size == 1
            module._use_memory_efficient_attention_xformers, module._slice_size = False, None
    assert torch.equal(pipelines.result(pipe, call), before)
    assert objects_of(pipe).keys() == objects.keys()


def test_xformers_stays_on_where_it_works(monkeypatch):
    from types import SimpleNamespace

    from comfyui_attune.pipelines import hooks

    known = {"xformers_cutlass": SimpleNamespace(works=True)}
    monkeypatch.setattr(hooks, "verdicts", lambda: SimpleNamespace(known=lambda device: known))
    pipe, call = pipelines.sd15()
    controlvideo_like(pipe.unet)
    before = pipelines.result(pipe, call)
    module = next(one for one in pipe.unet.modules() if isinstance(one, FullyFrameAttention))
    module._use_memory_efficient_attention_xformers = True
    with attune.applied(pipe, "split") as handle:
        assert module._use_memory_efficient_attention_xformers is True
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == {"split": 17}  # its call, too: xformers' own broken one is never made


class OneModule:
    """A pipeline around one module, to call it in a forward of ours."""

    def __init__(self, module):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = module

            def forward(self, *args):
                return self.attention._attention(*args)

        self.model = Model()
        self.components = {"model": self.model}

    def __call__(self, *args):
        return self.model(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("mask", [None, (6, 5, 9), (6, 1, 9), (1, 5, 9), (1, 1, 9)])
@pytest.mark.parametrize("kernel", ["split", "sdpa", "host"])
def test_own_attention_with_masks_and_types(dtype, upcast, mask, kernel):
    torch.manual_seed(0)
    module = FullyFrameAttention(24, upcast_attention=upcast)
    q, k, v = (torch.randn(6, length, 12).to(dtype) for length in (5, 9, 9))
    q = torch.randn(6, 12, 5).to(dtype).transpose(1, 2)  # not contiguous
    bias = None if mask is None else torch.randn(*mask).to(dtype)
    with torch.no_grad():
        wanted = module._attention(q.float(), k.float(), v.float(), None if bias is None else bias.float())
        pipe = OneModule(module)
        with attune.applied(pipe, kernel) as handle:
            out = pipe(q, k, v, bias)
            assert set(handle.data()[0]["observed"]) == {kernel}
            assert ("upcast_attention" in handle.report()) is (
                kernel == "host" and upcast and dtype is not torch.float32
            )
    assert out.dtype is dtype and out.shape == (3, 5, 24)
    error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (out.float() - wanted).norm() / wanted.norm() < error


# Bad input


def test_what_is_no_pipeline():
    with pytest.raises(TypeError, match=r"wants a diffusers pipeline.*got builtins\.str"):
        attune.apply("stable-diffusion-v1-5")
    pipe, _ = pipelines.sd15()
    with pytest.raises(TypeError, match=r"UNet2DConditionModel\. Give the pipeline"):
        attune.apply(pipe.unet)
    with pytest.raises(TypeError, match="not its class"):
        attune.apply(type(pipe))


def test_unknown_names():
    pipe, _ = pipelines.sd15()
    objects = objects_of(pipe)
    with pytest.raises(UnknownKernelError, match=r"'sage9'.*sdpa_efficient"):
        attune.apply(pipe, "sage9")
    with pytest.raises(TypeError, match="wanted the name of a kernel"):
        attune.apply(pipe, 3)
    with pytest.raises(ValueError, match="'wrap' or 'leave'"):
        attune.apply(pipe, "sdpa", foreign="maybe")
    assert objects_of(pipe) == objects


def test_a_pipeline_without_attention(caplog):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipe = DDPMPipeline(net, DDPMScheduler())
    objects = objects_of(pipe)
    handle = attune.apply(pipe)
    assert "no model of this DDPMPipeline has an attention module" in handle.report()
    assert "unchanged" in caplog.text
    assert objects_of(pipe) == objects
    handle.remove()


def test_switched_off(monkeypatch):
    monkeypatch.setenv("ATTUNE", "off")
    pipe, _ = pipelines.sd15()
    objects = objects_of(pipe)
    handle = attune.apply(pipe)
    assert objects_of(pipe) == objects
    assert "ATTUNE=off" in handle.report()
    handle.remove()


def test_a_run_that_fails_or_is_stopped_is_recorded():
    pipe, call = pipelines.sd15()
    with attune.applied(pipe, "split") as handle:

        def stop(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pipe(**call, callback_on_step_end=stop)
        with pytest.raises(ValueError):
            pipe(**{**call, "height": 33})
        assert [run["status"] for run in handle.data()] == ["stopped", "failed"]
        assert handle.data()[0]["observed"] == {"split": 8}


# The package


def test_the_names_are_there_and_cost_nothing_until_used():
    code = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('comfyui_attune', {str(ROOT / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(ROOT)!r}])\n"
        "package = importlib.util.module_from_spec(spec)\n"
        "sys.modules['comfyui_attune'] = package\n"
        "spec.loader.exec_module(package)\n"
        "before = sorted(sys.modules)\n"
        "package.apply, package.applied\n"
        "print(json.dumps([before, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    before, after = json.loads(done.stdout)
    assert not {"torch", "diffusers"} & set(before)
    assert not {"comfy", "diffusers", "xformers", "flash_attn"} & set(after)
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        attune.aply  # noqa: B018


# Text encoders


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_text_encoders_on_request():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=99,
        max_position_embeddings=9,
    )  # fmt: skip
    pipe, _ = pipelines.sd15()
    pipe.text_encoder = CLIPTextModel(config).eval()
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        before = pipe.text_encoder(tokens).last_hidden_state
        with attune.applied(pipe, "split") as handle:
            assert torch.equal(pipe.text_encoder(tokens).last_hidden_state, before)
            assert "text_encoder" not in handle.models and not handle.data()
        with attune.applied(pipe, "split", text_encoders=True) as handle:
            assert torch.allclose(pipe.text_encoder(tokens).last_hidden_state, before, atol=1e-5)
            assert "text_encoder" in handle.models
            observed, text = handle.data()[0]["observed"], handle.report()
        assert torch.equal(pipe.text_encoder(tokens).last_hidden_state, before)
    # Causal attention is nothing that the pack describes: the encoder's own stays, and the report says why.
    assert observed in ({"split": 2}, {"host": 2})
    assert observed == {"split": 2} or "is_causal" in text
