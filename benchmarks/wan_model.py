"""A Wan model of any size with random weights, in the ComfyUI of this process: what auto.py and real_size.py sample."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def import_comfy(folder: Path, cpu: bool) -> None:
    """Make `import comfy…` work, with the ComfyUI in `folder`."""
    sys.path.append(str(folder))
    import comfy.options  # noqa: F401  First: it keeps comfy.cli_args from reading our arguments.
    from comfy.cli_args import args

    args.cpu = cpu


def random_wan(dtype: torch.dtype, device: str = "cpu", *, blocks: int, dim: int, ffn_dim: int, text_dim: int) -> Any:
    """A ModelPatcher of a Wan text-to-video model (heads of 128), as ComfyUI makes it of a file with such weights.

    The same arguments give the same weights. They are made on `device` and wait in main memory until they are used.
    """
    import comfy.ldm.wan.model
    import comfy.ops
    import comfy.sd

    net = comfy.ldm.wan.model.WanModel(
        model_type="t2v", in_dim=16, out_dim=16, dim=dim, ffn_dim=ffn_dim, num_heads=dim // 128, num_layers=blocks,
        text_dim=text_dim, device="meta", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    random = torch.Generator(device).manual_seed(0)

    def weight(name: str, shape: torch.Size) -> torch.Tensor:
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            return torch.ones(shape, dtype=dtype)
        size = 0.02 if len(shape) < 2 else shape[1:].numel() ** -0.5
        return (torch.randn(shape, generator=random, device=device) * size).to(dtype).cpu()

    state = {name: weight(name, old.shape) for name, old in net.state_dict().items()}
    about = {"config": json.dumps({"transformer": {"text_dim": text_dim}})}
    return comfy.sd.load_diffusion_model_state_dict(state, metadata=about, disable_dynamic=True)
