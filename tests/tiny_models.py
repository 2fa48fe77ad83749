"""Tiny models that ComfyUI's real loaders accept, with seeded random weights: Wan 2.2 under the official file names,
Flux, SD3 and SD1.5.

    <python of .venv> tests/tiny_models.py <folder of ComfyUI> <models folder> [file name ...]

Files that are there already are kept; a file is complete or absent. Without file names all of them are made.
"""

import functools
import hashlib
import json
import math
import os
import sys
import zlib
from pathlib import Path

WAN_2_2_VAE = "vae/wan2.2_vae.safetensors"


def main(comfyui: Path, models: Path, wanted: list[str]) -> None:
    """Make the files named in `wanted` (all when empty) below `models`. Raises SystemExit for an unknown name."""
    names = {path.rsplit("/", 1)[-1]: path for path in RECIPES}
    if unknown := [name for name in wanted if name not in names]:
        sys.exit(f"no tiny model is known for {', '.join(unknown)}; known are: {', '.join(names)}")
    _forget_older_recipes(models)
    missing = [names[name] for name in wanted or names if not (models / names[name]).exists()]
    if missing:
        import_comfy(comfyui)
    for path in missing:
        target = models / path
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
        RECIPES[path](unfinished)
        os.replace(unfinished, target)
        print(path, flush=True)


def _forget_older_recipes(models: Path) -> None:
    """Remove the files that another version of this script made."""
    stamp, here = models / "made-by.txt", hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text("utf-8") == here:
        return
    for path in RECIPES:
        (models / path).unlink(missing_ok=True)
    models.mkdir(parents=True, exist_ok=True)
    stamp.write_text(here, "utf-8")


def import_comfy(comfyui: Path) -> None:
    """Make `import comfy` work, on the CPU."""
    sys.path.insert(0, str(comfyui))
    import comfy.options  # noqa: F401  It has to come first: it keeps comfy.cli_args from reading our arguments.
    from comfy.cli_args import args

    args.cpu = True


def wan(seed: int, target: Path, in_dim: int, out_dim: int, **config) -> None:
    """A Wan diffusion model: 2 blocks of 2 heads of 128, its text input as wide as CLIP-L's output.

    `config` is what the loader is told besides: causal_ar makes it an autoregressive one.
    """
    import comfy.ldm.wan.model
    import comfy.ops

    model = comfy.ldm.wan.model.WanModel(
        model_type="t2v", in_dim=in_dim, out_dim=out_dim, dim=256, ffn_dim=512, num_heads=2, num_layers=2,
        text_dim=768, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    save(random_state(model, seed), target, {"config": json.dumps({"transformer": {"text_dim": 768, **config}})})


def flux(seed: int, target: Path) -> None:
    """A Flux model: 2 double and 2 single blocks of 2 heads of 128, its text input as wide as CLIP-L's output."""
    import comfy.ldm.flux.model
    import comfy.ops

    model = comfy.ldm.flux.model.Flux(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=768, hidden_size=256, mlp_ratio=4.0,
        num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
        guidance_embed=True, txt_ids_dims=[], operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    save(random_state(model, seed), target, fp8=True)


def sd3(seed: int, target: Path) -> None:
    """An SD3 model: 2 blocks of 2 heads of 64, its text input as wide as CLIP-L's output."""
    import comfy.ldm.modules.diffusionmodules.mmdit
    import comfy.ops

    text = {"target": "torch.nn.Linear", "params": {"in_features": 768, "out_features": 128}}
    model = comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=2, adm_in_channels=768, context_embedder_config=text,
        num_patches=64, pos_embed_max_size=8, qk_norm="rms", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    save(random_state(model, seed), target, fp8=True)


# The names of SD1.5 need these widths; the rest is as small as it can be: one level, one block at each of its places.
_SD15 = {
    "image_size": 32, "in_channels": 4, "model_channels": 320, "num_res_blocks": [1], "channel_mult": [1],
    "num_heads": 8, "use_spatial_transformer": True, "transformer_depth": [1], "transformer_depth_middle": 1,
    "context_dim": 768, "legacy": False,
}  # fmt: skip


def sd15(seed: int, target: Path) -> None:
    """An SD1.5 UNet with three transformers of 8 heads of 40."""
    import comfy.ldm.modules.diffusionmodules.openaimodel
    import comfy.ops
    import torch

    model = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        out_channels=4, transformer_depth_output=[0, 1], dtype=torch.float32,
        operations=comfy.ops.disable_weight_init, **_SD15,
    )  # fmt: skip
    save(random_state(model, seed), target, fp8=True)


def sd15_controlnet(seed: int, target: Path) -> None:
    """A ControlNet for sd15(), with weights where an untrained one has zeros."""
    import comfy.cldm.cldm
    import comfy.ops

    model = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, **_SD15)
    save(random_state(model, seed), target, fp8=True)


def lora(seed: int, target: Path, layers: tuple[str, ...], scale: float = 1.0) -> None:
    """A LoRA of rank 4 for `layers`, square ones of width 256. With `scale` NaN every weight of theirs becomes NaN."""
    import torch

    random = torch.Generator().manual_seed(seed)
    state = {}
    for layer in layers:
        state[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(4, 256, generator=random) / 16
        state[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(256, 4, generator=random) / 16 * scale
    save(state, target)


def clip_l(seed: int, target: Path) -> None:
    """A text encoder that CLIPLoader accepts with type "wan"; umt5 itself cannot be made small."""
    import comfy.clip_model
    import comfy.ops
    import comfy.sd1_clip
    import torch

    config = json.loads((Path(comfy.sd1_clip.__file__).parent / "sd1_clip_config.json").read_text("utf-8"))
    model = comfy.clip_model.CLIPTextModel(config, torch.float16, "cpu", comfy.ops.disable_weight_init)
    save(random_state(model, seed), target)


def vae_2_1(seed: int, target: Path) -> None:
    """The Wan 2.1 VAE, 12 times narrower than the real one."""
    import comfy.ldm.wan.vae

    model = comfy.ldm.wan.vae.WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    save(random_state(model, seed), target)


def vae_2_2(seed: int, target: Path) -> None:
    """The Wan 2.2 VAE. Its size is fixed in ComfyUI (705 million weights): all inner layers are zero here.

    The picture passes through the shortcuts around them, which are random as the outermost convolutions are.
    In fp8, and written with holes where the file system knows them, so that it takes little room and no time.
    """
    import comfy.ldm.wan.vae2_2
    import torch

    with torch.device("meta"):
        model = comfy.ldm.wan.vae2_2.WanVAE(
            dim=160, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True],
        )  # fmt: skip
    outer = ("conv1.", "conv2.", "encoder.conv1.", "encoder.head.", "decoder.conv1.", "decoder.head.")
    random = torch.Generator().manual_seed(seed)
    header, filled, end = {}, {}, 0
    for name, weight in model.state_dict().items():
        size = weight.numel()
        header[name] = {"dtype": "F8_E4M3", "shape": list(weight.shape), "data_offsets": [end, end + size]}
        if name.startswith(outer) or ".shortcut." in name or name.endswith("gamma"):
            filled[end] = random_weight(name, weight.shape, random).to(torch.float8_e4m3fn)
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        for offset, weight in filled.items():
            file.seek(start + offset)
            file.write(weight.view(torch.uint8).numpy().tobytes())


def random_state(model, seed: int) -> dict:
    """Weights for every entry of the model's state: scales one, offsets small, the rest normal by fan-in."""
    import torch

    random = torch.Generator().manual_seed(seed)
    return {
        name: random_weight(name, old.shape, random) if old.is_floating_point() else old
        for name, old in model.state_dict().items()
    }


def random_weight(name: str, shape, random):
    """One tensor of random_state(), float32."""
    import torch

    if name.endswith("bias") or "modulation" in name:
        return torch.randn(shape, generator=random) * 0.02
    if name.endswith("gamma") or len(shape) < 2:
        return torch.ones(shape)
    return torch.randn(shape, generator=random) / math.sqrt(math.prod(shape[1:]))


def save(state: dict, target: Path, metadata: dict | None = None, fp8: bool = False) -> None:
    """Write `state` as float16, or in 8 bits where the file has to be small."""
    import safetensors.torch
    import torch

    dtype = torch.float8_e4m3fn if fp8 else torch.float16
    half = {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in state.items()}
    safetensors.torch.save_file({name: weight.contiguous() for name, weight in half.items()}, str(target), metadata)


_FLUX_LAYERS = tuple(f"double_blocks.{block}.{part}.proj" for block in range(2) for part in ("img_attn", "txt_attn"))
_WAN_LAYERS = tuple(
    f"blocks.{block}.{part}.{name}" for block in range(2) for part in ("self_attn", "cross_attn") for name in "qkvo"
)


def _recipes() -> dict:
    wan_lora = functools.partial(lora, layers=_WAN_LAYERS)
    made = {
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": clip_l,
        "vae/wan_2.1_vae.safetensors": vae_2_1,
        WAN_2_2_VAE: vae_2_2,
        "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors": functools.partial(wan, in_dim=48, out_dim=48),
        "diffusion_models/wan_ar.safetensors": functools.partial(wan, in_dim=16, out_dim=16, causal_ar=True),
        "diffusion_models/flux1-dev.safetensors": flux,
        "diffusion_models/sd3_medium.safetensors": sd3,
        "diffusion_models/sd1.5.safetensors": sd15,
        "controlnet/control_sd1.5.safetensors": sd15_controlnet,
        "loras/flux.safetensors": functools.partial(lora, layers=_FLUX_LAYERS),
        "loras/nan.safetensors": functools.partial(lora, layers=("blocks.0.self_attn.v",), scale=math.nan),
    }
    for noise in ("high", "low"):
        for kind, in_dim, version in (("i2v", 36, "v1"), ("t2v", 16, "v1.1")):
            model = f"diffusion_models/wan2.2_{kind}_{noise}_noise_14B_fp8_scaled.safetensors"
            made[model] = functools.partial(wan, in_dim=in_dim, out_dim=16)
            made[f"loras/wan2.2_{kind}_lightx2v_4steps_lora_{version}_{noise}_noise.safetensors"] = wan_lora
    # The seed comes from the name: each file is different, and the same on every machine.
    return {path: functools.partial(make, zlib.crc32(path.encode())) for path, make in made.items()}


RECIPES = _recipes()

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
