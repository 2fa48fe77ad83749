"""Tiny Wan 2.2 models that ComfyUI's real loaders accept, under the official file names, with seeded random weights.

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


def wan(seed: int, target: Path, in_dim: int, out_dim: int) -> None:
    """A Wan diffusion model: 2 blocks of 2 heads of 128, its text input as wide as CLIP-L's output."""
    import comfy.ldm.wan.model
    import comfy.ops

    model = comfy.ldm.wan.model.WanModel(
        model_type="t2v", in_dim=in_dim, out_dim=out_dim, dim=256, ffn_dim=512, num_heads=2, num_layers=2,
        text_dim=768, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    save(random_state(model, seed), target, {"config": json.dumps({"transformer": {"text_dim": 768}})})


def lora(seed: int, target: Path) -> None:
    """A LoRA of rank 4 for the attention projections of wan()."""
    import torch

    random = torch.Generator().manual_seed(seed)
    state = {}
    for block in range(2):
        for part in ("self_attn", "cross_attn"):
            for name in "qkvo":
                key = f"diffusion_model.blocks.{block}.{part}.{name}"
                state[f"{key}.lora_down.weight"] = torch.randn(4, 256, generator=random) / 16
                state[f"{key}.lora_up.weight"] = torch.randn(256, 4, generator=random) / 16
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


def save(state: dict, target: Path, metadata: dict | None = None) -> None:
    """Write `state` as float16."""
    import safetensors.torch
    import torch

    half = {name: weight.to(torch.float16) if weight.is_floating_point() else weight for name, weight in state.items()}
    safetensors.torch.save_file({name: weight.contiguous() for name, weight in half.items()}, str(target), metadata)


def _recipes() -> dict:
    made = {
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": clip_l,
        "vae/wan_2.1_vae.safetensors": vae_2_1,
        WAN_2_2_VAE: vae_2_2,
        "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors": functools.partial(wan, in_dim=48, out_dim=48),
    }
    for noise in ("high", "low"):
        for kind, in_dim, version in (("i2v", 36, "v1"), ("t2v", 16, "v1.1")):
            model = f"diffusion_models/wan2.2_{kind}_{noise}_noise_14B_fp8_scaled.safetensors"
            made[model] = functools.partial(wan, in_dim=in_dim, out_dim=16)
            made[f"loras/wan2.2_{kind}_lightx2v_4steps_lora_{version}_{noise}_noise.safetensors"] = lora
    # The seed comes from the name: each file is different, and the same on every machine.
    return {path: functools.partial(make, zlib.crc32(path.encode())) for path, make in made.items()}


RECIPES = _recipes()

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
