"""Stand-in for sageattention 1.0.6: `k -= mean` in place, masks and unknown keywords swallowed."""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any, Optional

import torch

_pretend = SimpleNamespace(**run_path(str(Path(__file__).resolve().parents[2] / "pretend.py")))
CALLS: list[dict] = []


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal=False,
    sm_scale: Optional[float] = None,  # noqa: UP045
    smooth_k: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    CALLS.append({"tensor_layout": tensor_layout, "sm_scale": sm_scale, **kwargs})
    _pretend.not_modelled(is_causal=(is_causal, False))
    dtype = q.dtype
    assert dtype in [torch.float16, torch.bfloat16, torch.float32], (
        "Input tensors must be in dtype of torch.float16, torch.bfloat16, or torch.float32."
    )
    assert q.device == k.device == v.device, "All tensors must be on the same device."
    assert q.dtype == k.dtype == v.dtype, "All tensors must have the same dtype."
    assert q.size(-1) in [64, 96, 128], "headdim should be in [64, 96, 128]."
    assert q.stride(-1) == 1 and k.stride(-1) == 1 and v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    seq_dim = 1 if tensor_layout == "NHD" else 2
    if smooth_k:
        km = k.mean(dim=seq_dim, keepdim=True)
        k -= km
    if dtype == torch.bfloat16 or dtype == torch.float32:
        v = v.to(torch.float16)
    if tensor_layout not in ("HND", "NHD"):
        raise ValueError(f"Unknown tensor layout: {tensor_layout}")
    if tensor_layout == "NHD":
        q, k, v = _pretend.bhnd(q, k, v)
    # The real kernel reads V with Q's head dimension, whatever there is.
    _pretend.check(v.shape == k.shape, RuntimeError, "V is read out of bounds")
    # The scale goes into Q before it is quantised, so its sign does not matter here.
    out, _ = _pretend.attend(q, k, v, sm_scale, scale_first=True)
    return out.transpose(1, 2).contiguous() if tensor_layout == "NHD" else out
