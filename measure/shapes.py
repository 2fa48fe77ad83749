"""The attention shapes of models, from resolution and frames. docs/benchmarks.md has the formulae with their sources.

A video VAE keeps the first frame and folds the others: frames → (frames - 1) // s_t + 1 latent frames, height and width
→ // s. A patch of (p_t, p_h, p_w) latent cells is one token; what does not divide is padded (ComfyUI's
`pad_to_patch_size`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Three = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call: q (B, H, N, D), k and v (B, H, M, D). `name` says where it comes from."""

    name: str
    batch: int
    heads: int
    q_len: int
    kv_len: int
    head_dim: int

    @property
    def flops(self) -> int:
        """4·B·H·N·M·D: a multiplication and an addition per term of Q Kᵀ and of P V; the softmax is not counted."""
        return 4 * self.batch * self.heads * self.q_len * self.kv_len * self.head_dim

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        return self.batch, self.heads, self.q_len, self.kv_len, self.head_dim

    def __str__(self) -> str:
        return (
            f"{self.name}: batch {self.batch}, {self.heads} heads of {self.head_dim}, "
            f"{self.q_len:,} x {self.kv_len:,} tokens"
        )


def video_tokens(width: int, height: int, frames: int, strides: Three, patch: Three = (1, 2, 2)) -> int:
    """Tokens of a video; `strides` are the VAE's and `patch` the model's, each as (time, height, width)."""
    if min(width, height, frames) < 1:
        raise ValueError(f"{width} x {height}, {frames} frames is no video")
    latent = ((frames - 1) // strides[0] + 1, height // strides[1], width // strides[2])
    if min(latent) < 1:
        raise ValueError(f"{width} x {height} is smaller than one cell of the VAE ({strides[2]} x {strides[1]})")
    t, h, w = (-(-size // step) for size, step in zip(latent, patch, strict=True))
    return t * h * w


def image_tokens(width: int, height: int, stride: int = 8, patch: int = 2) -> int:
    """Tokens of a picture: one for each stride·patch square of pixels."""
    return video_tokens(width, height, 1, (1, stride, stride), (1, patch, patch))


# The VAEs' strides over (time, height, width).
WAN_14B, WAN_5B = (4, 8, 8), (4, 16, 16)
HUNYUAN = (4, 8, 8)
LTXV = (8, 32, 32)
WAN_TEXT, FLUX_TEXT, HUNYUAN_TEXT, LTXV_TEXT, CLIP_TEXT = 512, 512, 256, 128, 77
QWEN_TEXT = 256  # as long as the prompt: our assumption


def _both(place: str, heads: int, tokens: int, text: int, dim: int, batch: int = 1) -> tuple[Shape, Shape]:
    """The self and the cross attention of one block."""
    return (
        Shape(f"{place} self", batch, heads, tokens, tokens, dim),
        Shape(f"{place} cross", batch, heads, tokens, text, dim),
    )


def _joint(place: str, heads: int, tokens: int, text: int, dim: int) -> tuple[Shape]:
    """Picture and text in one sequence."""
    return (Shape(f"{place} joint", 1, heads, tokens + text, tokens + text, dim),)


def _wan_14b() -> tuple[Shape, ...]:
    found: list[Shape] = []
    videos = [(*size, frames) for size in ((832, 1216), (1280, 720)) for frames in (25, 49, 81)]
    for width, height, frames in [(832, 480, 81), *videos]:
        tokens = video_tokens(width, height, frames, WAN_14B)
        found += _both(f"{width}x{height} {frames}f", 40, tokens, WAN_TEXT, 128)
    return tuple(found)


def _wan_5b() -> tuple[Shape, ...]:
    found: list[Shape] = []
    for frames in (49, 121):
        found += _both(f"1280x704 {frames}f", 24, video_tokens(1280, 704, frames, WAN_5B), WAN_TEXT, 128)
    return tuple(found)


def _flux() -> tuple[Shape, ...]:
    return _joint("flux 1024x1024", 24, image_tokens(1024, 1024), FLUX_TEXT, 128)


def _qwen_image() -> tuple[Shape, ...]:
    return _joint("qwen 1328x1328", 24, image_tokens(1328, 1328), QWEN_TEXT, 128)


def sdxl_levels(width: int, height: int) -> tuple[Shape, ...]:
    """The two levels of the UNet that attend, 640 and 1280 channels wide; two conditionings are one batch."""
    found: list[Shape] = []
    for level, heads in ((1, 10), (2, 20)):
        tokens = (width // 8 >> level) * (height // 8 >> level)
        found += _both(f"sdxl {width}x{height} level {level}", heads, tokens, CLIP_TEXT, 64, batch=2)
    return tuple(found)


def _hunyuan() -> tuple[Shape, ...]:
    found: list[Shape] = []
    for width, height, frames in ((960, 544, 129), (1280, 720, 129)):
        tokens = video_tokens(width, height, frames, HUNYUAN)
        found += _joint(f"{width}x{height} {frames}f", 24, tokens, HUNYUAN_TEXT, 128)
    return tuple(found)


def _ltxv() -> tuple[Shape, ...]:
    found: list[Shape] = []
    for width, height, frames in ((768, 512, 97), (1216, 704, 121)):
        tokens = video_tokens(width, height, frames, LTXV, (1, 1, 1))
        found += _both(f"{width}x{height} {frames}f", 32, tokens, LTXV_TEXT, 64)
    return tuple(found)


def _smoke() -> tuple[Shape, ...]:
    """Seconds on a CPU: the models' proportions with fewer heads, at resolutions nobody would use."""
    return (
        *_both("wan 256x256 25f", 4, video_tokens(256, 256, 25, WAN_14B), WAN_TEXT, 128),
        *_joint("flux 512x512", 4, image_tokens(512, 512), FLUX_TEXT, 128),
        *sdxl_levels(512, 512)[:2],
    )


SETS: dict[str, Callable[[], tuple[Shape, ...]]] = {
    "wan2.2-14b": _wan_14b,
    "wan2.2-5b": _wan_5b,
    "flux-1024": _flux,
    "qwen-image-1328": _qwen_image,
    "sdxl-1024": lambda: sdxl_levels(1024, 1024),
    "hunyuanvideo": _hunyuan,
    "ltxv": _ltxv,
    "smoke": _smoke,
}

# ControlVideo on 15 frames of 512 x 512 (SD1.5: 8 heads of 40, 4,096 tokens a frame, two conditionings): every frame
# attends to all frames. Its scores in float16 are the 112.5 GiB that were once asked of an RTX 5090.
MEMORY = Shape("controlvideo 15 frames", 2, 8, 15 * 4096, 15 * 4096, 40)


def parse_shape(text: str) -> Shape:
    """ "B,H,N,M,D" as a shape. Raises ValueError for anything else."""
    parts = text.split(",")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != 5 or min(numbers) < 1:
        raise ValueError(f"wanted B,H,N,M,D (five numbers above 0, as 1,24,4608,4608,128), found {text!r}")
    return Shape(",".join(map(str, numbers)), *numbers)
