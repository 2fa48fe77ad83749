"""The arithmetic of `attune_int8` in plain PyTorch, that of SageAttention 2 beside it, and inputs to tell them apart.

The recipes follow the kernel's order of blocks, so that what they give at lengths which the interpreter cannot do is
what the kernel gives but for the order of sums. All take and return (B, H, tokens, D).
"""

from __future__ import annotations

import math

import torch

KINDS = ("structured", "bias_k", "bias_v", "spike_k", "normal")
E4M3_MAX = 448.0


def make_case(
    kind: str, q_len: int, kv_len: int, dim: int = 128, heads: int = 4, seed: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v in bfloat16's numbers, in float32: like those of models, and as hard as the study in docs/kernels.md.

    That study does not say what its inputs were. Here the tokens of a head share eight directions, queries and keys the
    same ones and values others, with noise on top; of the sizes that were tried, these give its recipes the errors that
    it lists (docs/int8.md has both). Its values must share directions too: where they are noise, an output is a small
    remainder of what cancels out, and no kernel with values in e4m3 comes below 3 to 4 %, as on "normal" here and on
    make_inputs(). "bias_k", "bias_v": a constant per channel as well; "bias_k_40": a far larger one; "spike_k": two
    channels ten times as large.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, heads, *shape, generator=generator)

    # Queries come last: however many there are, keys and values are the same.
    k, v = normal(kv_len, dim), normal(kv_len, dim)
    about, meaning = normal(8, dim) / math.sqrt(8), normal(8, dim) / math.sqrt(8)
    if kind != "normal":
        tokens = normal(kv_len, 8)
        k = 0.85 * k + 0.75 * (tokens @ about)
        v = 0.25 * v + tokens @ meaning
    if kind.startswith("bias_k"):
        k = k + (40 if kind == "bias_k_40" else 6) * normal(1, dim)
    if kind == "bias_v":
        v = v + 4 * normal(1, dim)
    if kind == "spike_k":
        k[..., torch.randperm(dim, generator=generator)[:2]] *= 10
    q = normal(q_len, dim)
    if kind != "normal":
        q = 0.65 * q + 0.5 * (normal(q_len, 8) @ about)
    q, k, v = (tensor.bfloat16().float().to(device) for tensor in (q, k, v))
    return q, k, v


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The definition in float64, sliced over queries."""
    keys, values = k.double().transpose(-1, -2), v.double()
    parts = [torch.softmax(part.double() @ keys * q.shape[-1] ** -0.5, -1) @ values for part in q.split(64, dim=-2)]
    return torch.cat(parts, dim=-2)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def signed_hadamard(size: int) -> torch.Tensor:
    """As in kernels/int8/common.py, but orthogonal, and of any power of two up to 256."""
    row, column = torch.arange(size)[:, None], torch.arange(size)[None, :]
    odd = sum((row & column) >> bit for bit in range(8)) + ((row * 40503) >> 15)
    return torch.where(odd % 2 == 1, -(size**-0.5), size**-0.5)


def rotate(x: torch.Tensor, channels: int = 64) -> torch.Tensor:
    return (x.unflatten(-1, (-1, channels)) @ signed_hadamard(channels).to(x.device)).flatten(-2)


def to_int8(x: torch.Tensor, group: int) -> torch.Tensor:
    """x rounded to int8 and back, with a scale for each `group` tokens."""
    pad = -x.shape[-2] % group
    groups = torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, group))
    scale = groups.abs().amax((-1, -2), keepdim=True).clamp_min(1e-37) / 127
    return ((groups / scale).round() * scale).flatten(-3, -2)[..., : x.shape[-2], :]


def cut(x: torch.Tensor) -> torch.Tensor:
    """x with 13 bits behind the leading one and the rest cut off: what Hopper's tensor cores add e4m3 products with.

    Found by the authors of SageAttention 2 (arXiv 2411.10958) and of DeepSeek-V3 (arXiv 2412.19437, section 3.5.2).
    """
    return (x.view(torch.int32) & -(1 << 10)).view(torch.float32)


def multiply(weights: torch.Tensor, values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """weights · values + out as a tensor core does it, 32 keys at a time."""
    for part, value in zip(weights.split(32, dim=-1), values.split(32, dim=-2), strict=True):
        product = part @ value
        out = cut(product if out is None else out + product)
    assert out is not None
    return out


def blockwise(
    scores: torch.Tensor, values: torch.Tensor, block: int, fp8: bool, sums: str = "float32", top: float = E4M3_MAX
) -> torch.Tensor:
    """softmax(scores, to the base 2) · values with weights of each block rounded on their own; values are rounded.

    `sums`: how e4m3 products are added up. "float32"; "fresh": in a tensor core's few bits within a block, and blocks
    in float32; "single": in few bits all along. `top` is the largest weight.
    """
    log2_top = math.log2(top) if fp8 else 0.0
    row_max = torch.full_like(scores[..., :1], -torch.inf)
    row_sum, out = torch.zeros_like(row_max), scores.new_zeros(*scores.shape[:-1], values.shape[-1])
    for part, value in zip(scores.split(block, dim=-1), values.split(block, dim=-2), strict=True):
        new_max = torch.maximum(row_max, part.amax(-1, keepdim=True))
        weights = torch.exp2(part - (new_max - log2_top))
        shrink = torch.exp2(row_max - new_max)
        row_sum = row_sum * shrink + weights.sum(-1, keepdim=True)
        weights = e4m3(weights) if fp8 else weights.half().float()
        if sums == "single":
            out = multiply(weights, value, out * shrink)
        else:
            out = out * shrink + (multiply(weights, value) if sums == "fresh" else weights @ value)
        row_max = new_max
    return out / row_sum


def attune_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    fp8: bool = True,
    block: int = 128,
    turned: int = 64,
    smooth_v: str = "corrected",
    q_group: int = 1,
    k_group: int = 1,
    smooth_k: bool = True,
    sums: str = "fresh",
    top: float = E4M3_MAX,
) -> torch.Tensor:
    """The recipe of kernels/int8, and others.

    `turned`: channels that are rotated together, 0 for none; `smooth_v` is "no", "mean" or "corrected"; `q_group`,
    `k_group`: tokens that share a scale; the rest see above.
    """
    if smooth_k:
        k = k - k.mean(-2, keepdim=True)
    if turned:
        q, k = rotate(q, turned), rotate(k, turned)
    scores = to_int8(q, q_group) @ to_int8(k, k_group).transpose(-1, -2) * (q.shape[-1] ** -0.5 * math.log2(math.e))
    mean = torch.zeros_like(v[..., :1, :]) if smooth_v == "no" else v.mean(-2, keepdim=True)
    scale = (v - mean).abs().amax(-2, keepdim=True).clamp_min(1e-37) / (E4M3_MAX if fp8 else 1.0)
    scaled = (v - mean) / scale
    rounded = e4m3(scaled) if fp8 else scaled.half().float()
    if smooth_v == "corrected":
        mean = mean + (scaled - rounded).mean(-2, keepdim=True) * scale
    return blockwise(scores, rounded, block, fp8, sums, top) * scale + mean


def sage2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """SageAttention 2's recipe (arXiv 2411.10958): K smoothed, int8 per 32 queries and 64 keys, values in e4m3.

    Its accumulator of 22 bits is taken for exact, which favours it.
    """
    k = k - k.mean(-2, keepdim=True)
    scores = to_int8(q, 32) @ to_int8(k, 64).transpose(-1, -2) * (q.shape[-1] ** -0.5 * math.log2(math.e))
    scale = v.abs().amax(-2, keepdim=True) / E4M3_MAX
    return blockwise(scores, e4m3(v / scale), 64, True) * scale
