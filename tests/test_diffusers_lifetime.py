"""What happens to a patched pipeline: applied again, shared, copied, compiled, trained, thrown away."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import json
import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import comfyui_attune as attune
from support.pipes import broken_kernel, nothing_remembered, objects_of, state

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

import tiny_pipelines as pipelines
from controlvideo_modules import controlvideo_like

__all__ = ["nothing_remembered", "state"]  # fixtures of every test here
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and torch deprecate things of their own


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
    pipe, _ = pipelines.sd15()
    attune.apply(pipe, "split")
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None


def small_sd15():
    """With one level: a UNet of two takes four times as long to trace."""
    return pipelines.sd15(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )


@pytest.mark.parametrize(
    "make, way",
    [(small_sd15, "torch.compile"), (pipelines.flux, "model.compile"), (pipelines.flux, "blocks")],
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


def test_a_compiled_block_with_attention_of_its_own_is_routed():
    torch.compiler.reset()
    pipe, call = pipelines.sd15()
    controlvideo_like(pipe.unet)
    before = pipelines.result(pipe, call)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].compile(backend="eager", fullgraph=True)
    with attune.applied(pipe, "split") as handle:
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == {"split": 17}
    torch.compiler.reset()


@pytest.mark.parametrize(
    "make, model, method, first",
    [
        (pipelines.sd15, "vae", "decode", True),
        (pipelines.sd15, "vae", "decode", False),
        (pipelines.flux, "transformer", "forward", False),
    ],
)
def test_a_method_that_is_compiled_before_or_after(make, model, method, first):
    """`vae.decode = torch.compile(vae.decode)`, as recipes have it, without naming the module."""
    torch.compiler.reset()
    pipe, call = make()
    before = pipelines.result(pipe, call)
    model = getattr(pipe, model)

    def compile_it():
        setattr(model, method, torch.compile(getattr(model, method), backend="eager", fullgraph=True))

    if first:
        compile_it()
        pipelines.result(pipe, call)
    own = vars(model).get(method)
    handle = attune.apply(pipe, "split")
    if not first:
        pipelines.result(pipe, call)
        compile_it()
        own = vars(model)[method]
    for _ in range(2):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert set(handle.data()[-1]["observed"]) == {"split"}
        assert len({str(run["observed"]) for run in handle.data()}) == 1
    handle.remove()
    assert vars(model)[method] is own
    assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-6)
    assert len(handle.data()) == (2 if first else 3)
    torch.compiler.reset()


# Nothing is kept alive


def test_a_shared_model_keeps_no_pipeline():
    from diffusers import StableDiffusionPipeline

    pipe, call = pipelines.sd15()
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    before, objects = pipelines.result(other, call), objects_of(other)
    handle = attune.apply(pipe, "split")
    pipelines.result(pipe, call)
    gone = weakref.ref(pipe)
    del pipe
    assert gone() is None  # at once: nobody has to collect garbage first
    assert objects_of(other) == objects
    assert torch.equal(pipelines.result(other, call), before)
    assert handle.data()[0]["observed"] == {"split": 17} and len(handle.data()) == 1
    handle.remove()


def test_models_are_freed_with_their_pipeline():
    pipe, call = pipelines.sd15()
    attune.apply(pipe, "split")
    pipelines.result(pipe, call)
    gone = weakref.ref(pipe.unet)
    del pipe
    assert gone() is None


def test_a_model_that_is_taken_out_of_a_patched_pipeline_is_freed():
    pipe, call = pipelines.sd15()
    handle = attune.apply(pipe, "split")
    pipelines.result(pipe, call)
    processor = weakref.ref(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor)
    gone = weakref.ref(pipe.unet)
    pipe.unet.set_default_attn_processor()
    assert processor() is None
    pipe.unet = None
    gc.collect()
    assert gone() is None
    handle.remove()


# Copies


def flux_inputs():
    return {
        "hidden_states": torch.randn(1, 64, 4), "timestep": torch.ones(1), "img_ids": torch.zeros(64, 3),
        "encoder_hidden_states": torch.randn(1, 6, 32), "pooled_projections": torch.randn(1, 16),
        "txt_ids": torch.zeros(6, 3), "return_dict": False,
    }  # fmt: skip


def test_a_deep_copy_of_a_patched_model_is_a_model_of_its_own():
    pipe, _ = pipelines.flux()
    inputs = flux_inputs()
    with torch.no_grad():
        plain = pipe.transformer(**inputs)[0]
        objects = objects_of(pipe)
        with attune.applied(pipe, "split") as handle:
            patched = objects_of(pipe)
            twin = copy.deepcopy(pipe.transformer)
            assert objects_of(pipe) == patched  # and the model is still patched
            for weights in twin.parameters():
                weights.zero_()
            assert not twin(**inputs)[0].any()
            assert not handle.data()
            pipe.transformer(**inputs)
            assert handle.data()[0]["observed"] == {"split": 3}
        assert torch.equal(pipe.transformer(**inputs)[0], plain)
        assert objects_of(pipe) == objects
        twin(**inputs)
    for module in twin.modules():
        assert not {"forward", "__deepcopy__"} & set(vars(module))
        assert "_attention_backend" not in vars(getattr(module, "processor", module))


def test_deep_copies_of_a_patched_pipeline_and_of_a_part_of_it():
    pipe, call = pipelines.sd15()
    before, objects = pipelines.result(pipe, call), objects_of(pipe)
    with attune.applied(pipe, "split") as handle:
        twin, part = copy.deepcopy(pipe), copy.deepcopy(pipe.unet.mid_block)
        assert torch.equal(pipelines.result(twin, call), before)
        assert not handle.data()
    assert objects_of(pipe) == objects
    found = objects_of(twin)
    assert found.keys() == objects.keys() and type(twin) is type(pipe)
    assert part.attentions[0].transformer_blocks[0].attn1.forward.__self__ in part.modules()
    with attune.applied(twin, "split") as handle:  # a pipeline like any other
        pipelines.result(twin, call)
        assert handle.data()[0]["observed"] == {"split": 17}


# Gradients


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["AttnProcessor", "AttnProcessor2_0", "own"])
def test_gradient_checkpointing_computes_the_same_twice(kind, reentrant):
    from diffusers.models import attention_processor
    from torch.utils.checkpoint import checkpoint

    pipe, _ = pipelines.sd15()
    unet = pipe.unet.train()
    if kind == "own":
        controlvideo_like(unet)
    else:
        unet.set_attn_processor(getattr(attention_processor, kind)())
    unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    seed = pipelines.generator()
    sample = torch.randn(1, 4, 16, 16, generator=seed, requires_grad=True)
    text = torch.randn(1, 7, 16, generator=seed, requires_grad=True)

    def gradients():
        unet.zero_grad()
        unet(sample, 5, text).sample.square().sum().backward()
        return [weights.grad.clone() for weights in unet.parameters()]

    wanted = gradients()
    with attune.applied(pipe, "split") as handle:
        found = gradients()
        assert not handle.data()
        assert "gradients" in handle.report()
        with torch.no_grad():
            unet(sample, 5, text)
        assert handle.data()[0]["observed"] == {"split": 8}
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_forward_that_is_left_alone_has_its_own_back_end(monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    member, calls = AttentionBackendName("_native_math"), []
    its_own = _AttentionBackendRegistry._backends[member]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends, member, lambda *args, **kwargs: calls.append(1) or its_own(*args, **kwargs)
    )
    pipe, _ = pipelines.flux()
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = member
    inputs = flux_inputs()
    with attune.applied(pipe, "split"):
        pipe.transformer(**inputs)[0].sum().backward()
    assert len(calls) == 3


# Calls outside runs, and threads


def test_what_was_called_outside_runs_is_told_of_when_the_rules_have_changed():
    pipe, _ = pipelines.sd15()
    inputs = torch.randn(1, 4, 16, 16), 5, torch.randn(1, 7, 16)
    with torch.no_grad(), attune.applied(pipe, "split") as outer:
        pipe.unet(*inputs)
        with attune.applied(pipe, "sdpa_math") as inner:
            pipe.unet(*inputs)
            assert [run["observed"] for run in inner.data()] == [{"sdpa_math": 8}]
        pipe.unet(*inputs)
        observed = [run["observed"] for run in outer.data()]
    assert observed == [{"split": 8}, {"sdpa_math": 8}, {"split": 8}]


def test_text_encoders_are_covered_as_long_as_somebody_asks_for_them():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9,
        max_position_embeddings=9,
    )  # fmt: skip
    pipe, _ = pipelines.sd15()
    pipe.text_encoder = transformers.CLIPTextModel(config).eval()
    with attune.applied(pipe, "split") as outer:
        with attune.applied(pipe, "split", text_encoders=True):
            assert "text_encoder" in outer.models
        assert "text_encoder" not in outer.models and "unet" in outer.models
        assert "forward" not in vars(pipe.text_encoder)


def in_threads(*calls):
    """What each of them returns, made at the same time."""
    together = threading.Barrier(len(calls))

    def one(call):
        together.wait(timeout=60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [found.result(timeout=120) for found in [pool.submit(one, call) for call in calls]]


def test_pipelines_in_threads_that_share_a_model_keep_their_own_rules_and_records():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe, call = pipelines.sd15()
    call = {**call, "num_inference_steps": 6}
    others = {**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}
    other = StableDiffusionPipeline(**others, requires_safety_checker=False)
    unpatched = StableDiffusionPipeline(**others, requires_safety_checker=False)
    for one in (other, unpatched):
        one.set_progress_bar_config(disable=True)
    before, objects = pipelines.result(pipe, call), objects_of(pipe)
    with attune.applied(pipe, "split") as first, attune.applied(other, "sdpa_math") as second:
        for found in in_threads(*(functools.partial(pipelines.result, one, call) for one in (pipe, other, unpatched))):
            assert torch.allclose(found, before, atol=1e-4)
        assert first.data()[0]["observed"] == {"split": 49}
        assert second.data()[0]["observed"] == {"sdpa_math": 49}
    assert objects_of(pipe) == objects


def test_a_pipeline_called_by_two_threads_has_two_runs():
    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    with attune.applied(pipe, "split") as handle:
        for found in in_threads(*[functools.partial(pipelines.result, pipe, call)] * 2):
            assert torch.allclose(found, before, atol=1e-4)
        assert [run["observed"] for run in handle.data()] == [{"split": 17}] * 2
