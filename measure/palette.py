"""The colour of each kernel, the same in every picture.

A family has one hue, from the palette of Okabe and Ito, whose hues people with colour blindness can tell apart (Color
Universal Design, 2008); its members differ in lightness.
"""

from __future__ import annotations

import zlib

NOTHING = "#F1F3F5"  # no call here
_OF: dict[str, str] = {
    "host": "#8C8C8C",
    "sdpa": "#0072B2",
    "sdpa_flash": "#56B4E9",
    "sdpa_efficient": "#00456B",
    "sdpa_cudnn": "#3A8FC7",
    "sdpa_math": "#A9D6F5",
    "flash2": "#009E73",
    "flash3": "#00674B",
    "flash4": "#5FCBA8",
    "xformers": "#6F5FAE",
    "xformers_cutlass": "#B3A8DB",
    "sage1": "#F7D58B",
    "sage2_fp16_triton": "#F3BD3F",
    "sage2_fp16_cuda": "#E69F00",
    "sage2_fp8_cuda": "#B87A00",
    "sage2_fp8_cuda_pp": "#875A00",
    "sage3": "#D55E00",
    "sage3_per_block_mean": "#F0935A",
    "kitchen_int8": "#CC79A7",
    "attune_int8": "#8E3E6C",
    "attune_bf16": "#4E1F3B",
    "split": "#F0E442",
    "sub_quad": "#3D3D3D",
    "basic": "#C2C2C2",
}
_OTHERS = ("#5B3A29", "#A0785A", "#2F5D62", "#9AA65B")


def colour(kernel: str) -> str:
    """The colour of a kernel as "#rrggbb". One that this version does not know gets one by its name."""
    return _OF.get(kernel) or _OTHERS[zlib.crc32(kernel.encode()) % len(_OTHERS)]


def rgb(code: str) -> tuple[int, int, int]:
    """ "#rrggbb" as numbers from 0 to 255."""
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)
