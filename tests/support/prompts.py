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


# The tiny picture models (tests/tiny_models.py): file, and channels of the latent.
PICTURES = {
    "flux": ("flux1-dev.safetensors", 16),
    "sd3": ("sd3_medium.safetensors", 16),
    "sd15": ("sd1.5.safetensors", 4),
}


def picture(
    family: str,
    patch: Patch | None = None,
    steps: int = 3,
    cfg: float = 4.0,
    sampler: str = "euler",
    negative: str = "blurred",
    control: bool = False,
    seed: int = 5,
    size: int = 64,
):
    """A text-to-picture prompt on a model of PICTURES that saves its latent. Node 12 is the sampler.

    `patch(prompt, model, 0)` as in `two_stage`. `control`: a ControlNet stands on the positive conditioning, so that
    the two conditionings are not joined. `size` is in pixels.
    """
    file, channels = PICTURES[family]
    empty = "EmptyLatentImage" if channels == 4 else "EmptySD3LatentImage"
    prompt: Prompt = {
        "1": node("UNETLoader", unet_name=file, weight_dtype="default"),
        "3": node("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan"),
        "5": node("CLIPTextEncode", clip=["3", 0], text="a cat on a fence"),
        "6": node("CLIPTextEncode", clip=["3", 0], text=negative),
        "7": node(empty, width=size, height=size, batch_size=1),
    }
    positive = ["5", 0]
    if control:
        prompt["8"] = node("ControlNetLoader", control_net_name="control_sd1.5.safetensors")
        prompt["9"] = node("EmptyImage", width=size, height=size, batch_size=1, color=0x4080C0)
        prompt["10"] = node(
            "ControlNetApply", conditioning=positive, control_net=["8", 0], image=["9", 0], strength=1.0
        )
        positive = ["10", 0]
    model = patch(prompt, ["1", 0], 0) if patch else ["1", 0]
    prompt["12"] = node(
        "KSampler", model=model, seed=seed, steps=steps, cfg=cfg, sampler_name=sampler, scheduler="simple",
        positive=positive, negative=["6", 0], latent_image=["7", 0], denoise=1.0,
    )  # fmt: skip
    prompt["14"] = node("SaveLatent", samples=["12", 0], filename_prefix="tests/latent")
    return prompt


def autoregressive(patch: Patch | None = None, steps: int = 2, length: int = 9):
    """A prompt on the tiny autoregressive Wan model that saves its latent: frame by frame, each in `steps` forwards,
    with keys and values of the earlier ones kept.
    """
    prompt: Prompt = {
        "1": node("UNETLoader", unet_name="wan_ar.safetensors", weight_dtype="default"),
        "3": node("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan"),
        "5": node("CLIPTextEncode", clip=["3", 0], text="a cat on a fence"),
        "7": node("EmptyARVideoLatent", width=32, height=32, length=length, batch_size=1),
        "8": node("SamplerARVideo", num_frame_per_block=1),
    }
    model = patch(prompt, ["1", 0], 0) if patch else ["1", 0]
    prompt["9"] = node("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
    prompt["12"] = node(
        "SamplerCustom", model=model, add_noise=True, noise_seed=5, cfg=1.0, positive=["5", 0], negative=["5", 0],
        sampler=["8", 0], sigmas=["9", 0], latent_image=["7", 0],
    )  # fmt: skip
    prompt["14"] = node("SaveLatent", samples=["12", 0], filename_prefix="tests/latent")
    return prompt


def behind(prompt: Prompt, model: list, key: str, class_type: str, **inputs) -> list:
    """Put a node that takes and gives a model behind `model`; returns the link to it."""
    prompt[key] = node(class_type, model=model, **inputs)
    return [key, 0]


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
    """The latent that a prompt of `two_stage` or `picture` saved."""
    from safetensors.torch import load_file

    return load_file(next(file for file in result.files if Path(file).suffix == ".latent"))["latent_tensor"]
