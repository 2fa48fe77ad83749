"""Published speeds of attention kernels, as data with their source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Speeds of one GPU at 1K / 8K / 32K tokens, head dimension 128, forward; TFLOPS or TOPS (docs/kernels.md)."""

    gpu: str
    capability: tuple[int, int]
    speeds: dict[str, tuple[int, int, int]]


_FA2 = ("flash2", "sdpa_flash", "sdpa")  # PyTorch's flash back end is FlashAttention 2 (release notes of PyTorch 2.2)
SPEED_SOURCE = (
    "plots of github.com/thu-ml/SageAttention, arXiv 2410.02367, 2411.10958, 2505.11594 and 2407.08608, collected in "
    "docs/kernels.md; head dimension 128, Sage without its quantisation"
)
PUBLISHED: tuple[Published, ...] = (
    Published(
        "an RTX 3090",
        (8, 6),
        {"xformers": (43, 47, 45), **dict.fromkeys(_FA2, (62, 71, 68)), "sage1": (126, 136, 134)},
    ),
    Published(
        "an RTX 4090",
        (8, 9),
        {
            "xformers": (93, 105, 106),
            **dict.fromkeys(_FA2, (145, 164, 164)),
            "sage1": (259, 317, 322),
            "sage2_fp8_cuda": (346, 423, 431),
            "sage2_fp8_cuda_pp": (411, 490, 493),
        },
    ),
    Published(
        "an RTX 5090",
        (12, 0),
        {
            "xformers": (84, 94, 95),
            **dict.fromkeys(_FA2, (173, 212, 214)),
            "sage1": (442, 479, 479),
            "sage2_fp8_cuda": (489, 544, 554),
            "sage2_fp8_cuda_pp": (583, 628, 643),
            "sage3": (964, 1038, 1027),
        },
    ),
    Published(
        "an A100",
        (8, 0),
        {"xformers": (85, 110, 111), **dict.fromkeys(_FA2, (160, 204, 204)), "sage1": (193, 272, 278)},
    ),
    Published(
        "an H100",
        (9, 0),
        {
            "xformers": (166, 180, 180),
            **dict.fromkeys(_FA2, (319, 339, 339)),
            "sage1": (430, 516, 518),
            "sage2_fp8_cuda": (676, 900, 882),
            "flash3": (410, 459, 470),
            "sdpa_cudnn": (574, 600, 595),
        },
    ),
)
