"""How near two runs' pictures are: PSNR and SSIM."""

from __future__ import annotations

import io
import math
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_SIDE, _SIGMA = 11, 1.5  # SSIM's window
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
Pictures = list[bytes]  # files, in order


@dataclass(frozen=True)
class Agreement:
    """How near pictures are to others. `psnr`: in dB, None where nothing differs. `ssim`: 1 where nothing differs.

    `largest`: the largest difference of a channel, of 255.
    """

    psnr: float | None
    ssim: float
    largest: int


def fetch(outputs: Mapping[str, Any], taps: Sequence[str], get: Callable[[str], bytes]) -> Pictures:
    """The picture files that the nodes `taps` wrote. outputs: of the prompt, in /history. get: fetches a path."""
    found = []
    for node in taps:
        for item in (outputs.get(node) or {}).get("images") or []:
            names = {name: item.get(name, "") for name in ("filename", "subfolder", "type")}
            found.append(get(f"/view?{urllib.parse.urlencode(names)}"))
    return found


def decode(data: bytes) -> torch.Tensor:
    """A picture file as (3, height, width), uint8."""
    import numpy
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1)


def size(pictures: Pictures) -> tuple[int, int] | None:
    """(width, height) of the first one."""
    if not pictures:
        return None
    _, height, width = decode(pictures[0]).shape
    return width, height


def ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean structural similarity of two pictures, (channels, height, width) with values 0 to 255.

    Of each channel by itself, in a Gaussian window of 11 × 11, sigma 1.5, where it lies within the picture, K1 = 0.01,
    K2 = 0.03: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", IEEE Transactions on Image Processing 13,
    2004. NaN for pictures smaller than the window.
    """
    if min(one.shape[1:]) < _SIDE:
        return math.nan
    near = torch.arange(_SIDE, dtype=torch.float64) - _SIDE // 2
    window = torch.exp(-(near**2) / (2 * _SIGMA**2))
    window /= window.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        across = F.conv2d(values[:, None], window[None, None, None, :])
        return F.conv2d(across, window[None, None, :, None])

    x, y = one.double(), other.double()
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return float((alike / ((mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2))).mean())


def agreement(one: Pictures, other: Pictures) -> Agreement | str:
    """How near the second pictures are to the first: PSNR over all of them together, the mean of their SSIM.

    Instead of figures: why there are none.
    """
    if not one or not other:
        return "there are no pictures to compare"
    if len(one) != len(other):
        return f"the baseline has {len(one)} pictures, this run {len(other)}"
    squares, similar, largest, pixels, plain = 0.0, 0.0, 0, 0, True
    for first, second in zip(one, other, strict=True):
        a, b = decode(first), decode(second)
        if a.shape != b.shape:
            return "the baseline's pictures have another size"
        plain = plain and bool(a.min() == a.max())
        off = (a.int() - b.int()).abs()
        squares += float((off.double() ** 2).sum())
        largest = max(largest, int(off.max()))
        pixels += off.numel()
        similar += ssim(a, b) if int(off.max()) else 1.0
    if plain:
        return "the baseline's pictures are all of one colour: likeness to them says nothing"
    psnr = 10 * math.log10(255**2 * pixels / squares) if squares else None
    return Agreement(psnr, similar / len(one), largest)
