"""attune.apply on diffusers pipelines: every attention call is routed, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch

import comfyui_attune as attune
from comfyui_attune.attention.policy import BlockRange, Policy, Rule, UnknownKernelError
from support.loading import ROOT
from support.pipes import broken_kernel, counted_sdpa, nothing_remembered, objects_of, state

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

import tiny_pipelines as pipelines

__all__ = ["nothing_remembered", "state"]  # fixtures of every test here
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and torch deprecate things of their own
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
    assert "in an earlier run or stage of such a model" in handle.report()
    made = len(calls)
    pipe, call = pipelines.sdxl()
    with attune.applied(pipe, "sage1"):
        pipelines.result(pipe, call)
    assert len(calls) > made  # another model


def test_what_is_no_pipeline():
    with pytest.raises(TypeError, match=r"wants a diffusers pipeline.*got builtins\.str"):
        attune.apply("stable-diffusion-v1-5")
    pipe, _ = pipelines.sd15()
    with pytest.raises(TypeError, match=r"UNet2DConditionModel\. Give the pipeline"):
        attune.apply(pipe.unet)
    with pytest.raises(TypeError, match="not its class"):
        attune.apply(type(pipe))

    class Closed:
        __slots__ = ("components",)

        def __call__(self): ...

    closed = Closed()
    closed.components = {}
    with pytest.raises(TypeError, match=r"Closed has __slots__\. Give it a __dict__"):
        attune.apply(closed)


def test_unknown_names():
    pipe, _ = pipelines.sd15()
    objects = objects_of(pipe)
    with pytest.raises(UnknownKernelError, match=r"'sage9'.*sdpa_efficient"):
        attune.apply(pipe, "sage9")
    with pytest.raises(TypeError, match="wanted the name of a kernel"):
        attune.apply(pipe, 3)
    with pytest.raises(TypeError, match=r"found \['sage1', 'sdpa'\].*Rule\(\('sage1', 'sdpa'\)\)"):
        attune.apply(pipe, ["sage1", "sdpa"])
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
