"""Pipelines made of a patched one's models (from_pipe), loaded from its pickle, or hooked by diffusers after it."""

from __future__ import annotations

import gc
import importlib.util
import pickle
import weakref

import pytest
import torch

import comfyui_attune as attune
from support.pipes import nothing_remembered, objects_of, state

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

import tiny_pipelines as pipelines

__all__ = ["nothing_remembered", "state"]  # fixtures of every test here
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and torch deprecate things of their own


def image_call(call):
    """The same for a pipeline that also wants an image."""
    more = {key: value for key, value in call.items() if key not in ("height", "width")}
    return {**more, "image": torch.rand(1, 3, 32, 32, generator=pipelines.generator()), "strength": 1.0}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def models(pipe):
    return {key: what for key, what in objects_of(pipe).items() if key[0] in ("unet", "vae")}


def made_of(pipe, way):
    import diffusers

    kind = diffusers.StableDiffusionImg2ImgPipeline
    if way == "components":
        return kind(**pipe.components, requires_safety_checker=False)
    if way == "AutoPipeline":
        try:
            kind = diffusers.AutoPipelineForImage2Image
        except RuntimeError as error:
            pytest.skip(f"this diffusers cannot import its AutoPipeline with this transformers: {error}")
    return kind.from_pipe(pipe)


@pytest.mark.parametrize("way", ["from_pipe", "AutoPipeline", "components"])
def test_the_new_pipeline_follows_the_rules_when_the_first_is_thrown_away(way):
    from diffusers import DiffusionPipeline

    pipe, call = pipelines.sd15()
    plain, method = models(pipe), vars(DiffusionPipeline)["register_modules"]
    handle = attune.apply(pipe, "split")
    pipelines.result(pipe, call)
    pipe = quiet(made_of(pipe, way))  # as it is mostly written: the first is gone
    gc.collect()
    routed = pipelines.result(pipe, image_call(call))
    runs = handle.data()
    assert [run["observed"] for run in runs] == [{"split": 17}, {"split": 18}]  # an encoder's call more
    assert {step["step"] for step in runs[1]["steps"]} == {0, 1}  # and no call outside a run
    assert "made of a patched one's models" in handle.report() and "thrown away" not in handle.report()
    assert set(handle.models) == {"vae", "unet"}
    handle.remove()
    assert torch.allclose(pipelines.result(pipe, image_call(call)), routed, atol=1e-4)
    assert len(handle.data()) == 2
    assert models(pipe) == plain and not objects_of(pipe)["ours"]
    assert vars(DiffusionPipeline)["register_modules"] is method


def test_each_of_them_in_turn_and_rules_applied_later():
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    pipe, call = pipelines.sd15()
    with attune.applied(pipe, "split") as first:
        second = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
        with attune.applied(second, "sdpa_math") as later:
            pipelines.result(second, image_call(call))
            pipelines.result(pipe, call)
            third = quiet(StableDiffusionPipeline.from_pipe(second))
            del second
            gc.collect()
            pipelines.result(third, call)
            assert [run["observed"] for run in later.data()] == [{"sdpa_math": 18}, {"sdpa_math": 17}]
        pipelines.result(third, call)
        observed = [run["observed"] for run in first.data()]
    assert observed == [{"sdpa_math": 18}, {"split": 17}, {"sdpa_math": 17}, {"split": 17}]
    assert "forward" not in vars(third.unet)


def test_a_new_pipeline_is_freed_with_its_models():
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe, call = pipelines.sd15()
    handle = attune.apply(pipe, "split")
    other = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    pipelines.result(other, image_call(call))
    gone = [weakref.ref(other), weakref.ref(pipe.unet)]
    del pipe, other
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert "was thrown away" in handle.report()
    handle.remove()


def test_a_pipeline_that_has_but_the_vae_in_common_is_none_of_its_models():
    from diffusers import StableDiffusionPipeline

    pipe, _ = pipelines.sd15()
    with attune.applied(pipe, "split"):
        other = StableDiffusionPipeline(**{**pipe.components, "unet": pipelines.unet()}, requires_safety_checker=False)
        assert "forward" not in vars(other.unet)


def test_a_controlnet_that_is_added_takes_part():
    from diffusers import StableDiffusionControlNetPipeline

    pipe, _ = pipelines.sd15()
    donor, with_hint = pipelines.sd15_controlnet()
    with attune.applied(pipe, "split") as handle:
        other = quiet(StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=donor.controlnet))
        pipelines.result(other, with_hint)
        assert "controlnet" in handle.models
        assert set(handle.data()[0]["observed"]) == {"split"} and handle.data()[0]["observed"]["split"] > 17
    assert "forward" not in vars(donor.controlnet)


# Pickles


def through_pickle(thing, tmp_path):
    torch.save(thing, tmp_path / "saved.pt")
    return torch.load(tmp_path / "saved.pt", weights_only=False)


@pytest.mark.parametrize("make", [pipelines.sd15, pipelines.flux])
def test_a_pickle_of_a_patched_pipeline_or_model_is_not_patched(make, tmp_path):
    pipe, call = make()
    before, objects = pipelines.result(pipe, call), objects_of(pipe)
    name = "unet" if make is pipelines.sd15 else "transformer"
    with attune.applied(pipe, "split") as handle:
        patched = objects_of(pipe)
        twin, model = through_pickle(pipe, tmp_path), through_pickle(getattr(pipe, name), tmp_path)
        stored = (tmp_path / "saved.pt").read_bytes()
        assert objects_of(pipe) == patched  # and the pipeline still is
        for loaded in (twin, pickle.loads(pickle.dumps(pipe))):
            assert torch.equal(pipelines.result(quiet(loaded), call), before)
        assert not handle.data()
        pipelines.result(pipe, call)
        assert set(handle.data()[0]["observed"]) == {"split"}
    assert objects_of(pipe) == objects
    assert b"attune" not in stored  # it is for whoever has diffusers
    assert objects_of(twin).keys() == objects.keys() and type(twin) is type(pipe)
    setattr(pipe, name, model)
    assert torch.equal(pipelines.result(pipe, call), before)


# Hooks of diffusers


def test_offloading_hooks_of_diffusers_put_on_after_apply_have_the_models_own_forward_afterwards():
    from diffusers.hooks import apply_group_offloading

    pipe, call = pipelines.wan()
    before, cpu = pipelines.result(pipe, call), torch.device("cpu")
    with attune.applied(pipe, "split") as handle:
        apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        for _ in range(2):
            assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert [run["observed"] for run in handle.data()] == [{"split": 26}] * 2
    references = pipe.transformer._diffusers_hook._fn_refs
    inside = [one for reference in references for one in (reference.forward, reference.original_forward)]
    assert any(getattr(one, "__func__", None) is type(pipe.transformer).forward for one in inside)
    assert not any(one.__code__.co_filename.endswith("standing.py") for one in inside if hasattr(one, "__code__"))
    assert torch.equal(pipelines.result(pipe, call), before) and len(handle.data()) == 2
