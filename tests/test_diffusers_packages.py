"""Pipelines whose models accelerate offloads, or peft has put adapters into, before attune.apply or after it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import comfyui_attune as attune
from support.pipes import nothing_remembered, objects_of, state

if missing := [name for name in ("diffusers", "accelerate", "peft") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{' and '.join(missing)}: not installed", allow_module_level=True)

import accelerate
import peft
import tiny_pipelines as pipelines

__all__ = ["nothing_remembered", "state"]  # fixtures of every test here
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and torch deprecate things of their own
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def in_turn(pipe):
    """A whole model at a time: its hooks are taken off and put on again at the end of each call."""
    pipe.enable_model_cpu_offload(device="cpu")


def part_by_part(pipe):
    """As enable_sequential_cpu_offload() does it, which wants a GPU."""
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=bool(model._parameters))


def ours(pipe):
    """What is left of the pack in a pipeline's models, by the modules that functions are from."""
    found = []
    for model in (one for one in vars(pipe).values() if isinstance(one, torch.nn.Module)):
        for path, module in model.named_modules():
            for key, value in vars(module).items():
                while value is not None:
                    origin = getattr(value, "__globals__", {}).get("__name__") or type(value).__module__
                    found += [f"{path}.{key}"] if origin.startswith("comfyui_attune") else []
                    value = getattr(value, "__wrapped__", None)
    return found


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("offload", [in_turn, part_by_part])
@pytest.mark.parametrize("make", [pipelines.sd15, pipelines.flux])
def test_offloaded(make, offload, first, caplog):
    pipe, call = make()
    before = pipelines.result(pipe, call)
    if first:
        offload(pipe)
    handle = attune.apply(pipe, "split")
    if not first:
        pipelines.result(pipe, call)
        offload(pipe)
    counts = set()
    for _ in range(3):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        counts.add(len(ours(pipe)))
    assert len(counts) == 1, "what is changed grows with each call"
    assert len({str(run["observed"]) for run in handle.data()}) == 1
    assert set(handle.data()[0]["observed"]) == {"split"}
    handle.remove()
    assert not ours(pipe)
    assert torch.equal(pipelines.result(pipe, call), before)
    assert not [record for record in caplog.records if record.name == "attune"], "nothing went wrong"
    pipe.remove_all_hooks()
    assert not ours(pipe)


def test_a_model_that_is_compiled_and_offloaded_is_traced_once(monkeypatch):
    torch.compiler.reset()
    pipe, call = pipelines.flux()
    before = pipelines.result(pipe, call)
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    in_turn(pipe)
    resets, reset = [], torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(reset()))
    with attune.applied(pipe, "split") as handle:
        for _ in range(3):
            assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[2]["observed"] == {"split": 7}
        assert len(resets) == 1
    reset()


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_model_in_a_wrapper_of_peft(first):
    pipe, call = pipelines.flux()

    def wrap():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False)
        pipe.transformer = peft.get_peft_model(pipe.transformer, config)

    if first:
        wrap()
        before, objects = pipelines.result(pipe, call), objects_of(pipe)
    with attune.applied(pipe, "split") as handle:
        if not first:
            pipelines.result(pipe, call)
            wrap()
        routed = pipelines.result(pipe, call)
        assert handle.models == ["vae", "transformer"]
        assert handle.data()[-1]["observed"] == {"split": 7}
        assert "FluxTransformer2DModel" in handle.data()[-1]["model"]
    assert torch.allclose(pipelines.result(pipe, call), routed, atol=1e-4)
    if first:
        assert torch.equal(pipelines.result(pipe, call), before)
        assert objects_of(pipe) == objects


def test_a_text_encoder_in_a_wrapper_of_peft_is_a_text_encoder():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9,
        max_position_embeddings=9,
    )  # fmt: skip
    pipe, _ = pipelines.sd15()
    encoder = transformers.CLIPTextModel(config).eval()
    pipe.text_encoder = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with attune.applied(pipe, "split") as handle:
        assert "text_encoder" not in handle.models
    with attune.applied(pipe, "split", text_encoders=True) as handle:
        assert "text_encoder" in handle.models


def test_a_lora_is_put_into_a_patched_pipeline():
    pipe, call = pipelines.sd15()
    plain = pipelines.result(pipe, call)
    with attune.applied(pipe, "split") as handle:
        torch.manual_seed(1)
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
        routed = pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 17}
    assert torch.allclose(routed, pipelines.result(pipe, call), atol=1e-4)
    assert not torch.allclose(routed, plain, atol=1e-4)
