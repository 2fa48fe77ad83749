"""How far a kernel's output is from the reference, and inputs that show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

InputKind = Literal["normal", "structured", "bias_k", "bias_v", "spike_k"]


@dataclass(frozen=True, slots=True)
class Errors:
    """Figures of one comparison; every one is NaN where the output is not finite.

    `cosine` is the cosine similarity (1 is best), the others are relative: `l1` = Σ|out - ref| / Σ|ref|,
    `l2` = ‖out - ref‖ / ‖ref‖, `largest` = max|out - ref| / max|ref|.
    """

    cosine: float
    l1: float
    l2: float
    largest: float


def measure_errors(out: torch.Tensor, reference: torch.Tensor) -> Errors:
    """Compare tensors of one shape, in float64. Raises ValueError where the shapes differ."""
    if out.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(out.shape)} and {tuple(reference.shape)}")
    a, b = out.double().flatten(), reference.double().flatten()
    if not torch.isfinite(a).all():
        nan = float("nan")
        return Errors(nan, nan, nan, nan)
    difference = a - b
    tiny = torch.finfo(torch.float64).tiny

    def over(top: torch.Tensor, bottom: torch.Tensor) -> float:
        return float(top / bottom.clamp_min(tiny))

    return Errors(
        cosine=over(a @ b, a.norm() * b.norm()) if float(b.norm()) > 0 else float(float(a.norm()) == 0),
        l1=over(difference.abs().sum(), b.abs().sum()),
        l2=over(difference.norm(), b.norm()),
        largest=over(difference.abs().max(), b.abs().max()),
    )


def make_inputs(
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    *,
    kind: InputKind = "structured",
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, H, N, D) and k, v (B, Hkv, M, D) like those of real models, not only normal noise.

    "structured": tokens share a few directions, so attention is peaked. "bias_k", "bias_v": a constant per channel on
    top, as trained models have; "spike_k": two channels of K ten times as large. Quantising kernels fail on these and
    not on "normal" (docs/kernels.md). The same arguments give the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kv_heads = kv_heads or heads
    q = normal(batch, heads, q_len, head_dim)
    k = normal(batch, kv_heads, kv_len, head_dim)
    v = normal(batch, kv_heads, kv_len, head_dim)
    if kind != "normal":
        topics = normal(8, head_dim)
        q = q * 0.5 + topics[torch.randint(8, (batch, heads, q_len), generator=generator)]
        k = k * 0.5 + topics[torch.randint(8, (batch, kv_heads, kv_len), generator=generator)]
    if kind == "bias_k":
        k = k + 4 * normal(1, kv_heads, 1, head_dim)
    if kind == "bias_v":
        v = v + 4 * normal(1, kv_heads, 1, head_dim)
    if kind == "spike_k":
        k[..., torch.randperm(head_dim, generator=generator)[:2]] *= 10
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)
