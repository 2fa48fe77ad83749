"""API prompts on the tiny models, with the pack's nodes where a test wants them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Prompt = dict[str, dict]
Patch = Callable[[Prompt, list, int], list]


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


def two_stage(patch: Patch | None = None, steps: int = 4, split: int | None = None, size: int = 64, length: int = 5):
    """A two-stage Wan 2.2 text-to-video prompt that saves its latent. Nodes 12 and 13 are the samplers.

    `patch(prompt, model, stage)` may add nodes behind the model of stage 0 (high noise) and 1 (low noise) and returns
    the link to go on with.
    """
    patch = patch or (lambda prompt, model, stage: model)
    split = steps // 2 if split is None else split
    prompt: Prompt = {
        "3": node("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan"),
        "5": node("CLIPTextEncode", clip=["3", 0], text="a cat on a fence"),
        "6": node("CLIPTextEncode", clip=["3", 0], text="blurred"),
        "7": node("EmptyHunyuanLatentVideo", width=size, height=size, length=length, batch_size=1),
    }
    common = {
        "noise_seed": 5, "steps": steps, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple",
        "positive": ["5", 0], "negative": ["6", 0],
    }  # fmt: skip
    for stage, noise in enumerate(("high", "low")):
        loader, sampling, sampler = str(1 + stage), str(10 + stage), str(12 + stage)
        name = f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors"
        prompt[loader] = node("UNETLoader", unet_name=name, weight_dtype="default")
        model = patch(prompt, [loader, 0], stage)
        prompt[sampling] = node("ModelSamplingSD3", model=model, shift=8.0)
        prompt[sampler] = node(
            "KSamplerAdvanced",
            model=[sampling, 0],
            add_noise="disable" if stage else "enable",
            start_at_step=split if stage else 0,
            end_at_step=10_000 if stage else split,
            return_with_leftover_noise="disable" if stage else "enable",
            latent_image=["12", 0] if stage else ["7", 0],
            **common,
        )
    prompt["14"] = node("SaveLatent", samples=["13", 0], filename_prefix="tests/latent")
    return prompt


def selector(prompt: Prompt, model: list, key: str, kernel: str, **inputs) -> list:
    """Put an AttentionSelector with id `key` behind `model`; returns the link to it."""
    defaults = {
        "precision": "exact", "when_unavailable": "fallback", "cross_attention": "same", "min_tokens": 0,
    }  # fmt: skip
    prompt[key] = node("AttentionSelector", model=model, kernel=kernel, **{**defaults, **inputs})
    return [key, 0]


def rule(prompt: Prompt, model: list, key: str, kernel: str, **inputs) -> list:
    """Put an AttentionRule with id `key` behind `model`; returns the link to it."""
    defaults = {"from_percent": 0.0, "to_percent": 100.0, "blocks": "", "kind": "both"}
    prompt[key] = node("AttentionRule", model=model, kernel=kernel, **{**defaults, **inputs})
    return [key, 0]


def switch(prompt: Prompt, model: list, key: str, **inputs) -> list:
    """Put a Sage3Switch with id `key` behind `model`; returns the link to it."""
    defaults = {
        "enable": True, "per_block_mean": False, "dense_first_percent": 0.0, "dense_last_percent": 0.0,
        "dense_first_blocks": 0, "dense_last_blocks": 0,
    }  # fmt: skip
    prompt[key] = node("Sage3Switch", model=model, **{**defaults, **inputs})
    return [key, 0]


def latent(result):
    """The latent video that a prompt of `two_stage` saved."""
    from safetensors.torch import load_file

    return load_file(next(file for file in result.files if Path(file).suffix == ".latent"))["latent_tensor"]
