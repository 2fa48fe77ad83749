"""Builds of attention packages that can be had without a compiler, as data with sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prebuilt:
    """A build that can be had without a compiler, and the machines it is for.

    package: import name. version: the version it installs, which the kernels' own rules are asked about. arguments:
    what follows `pip install`; "{cuda}" stands for CUDA's digits. systems: (OS, CPU) as platform says them; python,
    torch: closed ranges; an empty tuple means any.
    """

    package: str
    version: str
    arguments: str
    source: str
    systems: tuple[tuple[str, str], ...] = ()
    python: tuple[tuple[int, int], tuple[int, int]] = ((3, 9), (3, 99))
    torch: tuple[tuple[int, ...], tuple[int, ...]] = ((2, 4), (99,))
    cuda: tuple[str, ...] = ()


_LINUX, _WINDOWS = ("Linux", "x86_64"), ("Windows", "AMD64")
_BOTH = (_LINUX, _WINDOWS)
_XFORMERS = "github.com/facebookresearch/xformers, README, and the requirement on torch in each wheel's metadata"
_SAGE_WHEEL = (
    "https://github.com/woct0rdho/SageAttention/releases/download/v2.2.0-windows.post4/"
    "sageattention-2.2.0%2Bcu{cuda}torch2.9.0andhigher.post4-cp39-abi3-win_amd64.whl"
)


def _xformers(
    version: str, torch: tuple[int, ...], last: tuple[int, ...], cuda: tuple[str, ...], newest: tuple[int, int]
) -> Prebuilt:
    arguments = f"--no-deps xformers=={version} --index-url https://download.pytorch.org/whl/cu{{cuda}}"
    return Prebuilt("xformers", version, arguments, _XFORMERS, _BOTH, ((3, 9), newest), (torch, last), cuda)


def _triton(torch: tuple[int, int], triton: int) -> tuple[Prebuilt, Prebuilt]:
    source = "github.com/woct0rdho/triton-windows, README; torch's own requirement on triton"
    return (
        Prebuilt("triton", f"3.{triton}", f'"triton==3.{triton}.*"', source, (_LINUX,), torch=(torch, torch)),
        Prebuilt(
            "triton", f"3.{triton}", f'"triton-windows<3.{triton + 1}"', source, (_WINDOWS,), torch=(torch, torch)
        ),
    )


PREBUILT: tuple[Prebuilt, ...] = (
    _xformers("0.0.29.post3", (2, 6, 0), (2, 6, 0), ("12.4", "12.6"), (3, 12)),
    _xformers("0.0.30", (2, 7, 0), (2, 7, 0), ("12.6", "12.8"), (3, 12)),
    _xformers("0.0.31.post1", (2, 7, 1), (2, 7, 1), ("12.6", "12.8"), (3, 13)),
    _xformers("0.0.32.post2", (2, 8, 0), (2, 8, 0), ("12.6", "12.8", "12.9"), (3, 13)),
    _xformers("0.0.33.post1", (2, 9, 0), (2, 9, 0), ("12.6", "12.8", "13.0"), (3, 13)),
    _xformers("0.0.33.post2", (2, 9, 1), (2, 9, 1), ("12.6", "12.8", "13.0"), (3, 13)),
    _xformers("0.0.35", (2, 10), (2, 11, 99), ("12.6", "12.8", "13.0"), (3, 13)),
    Prebuilt(
        "flash_attn",
        "2.8.3",
        "flash-attn==2.8.3 --no-build-isolation",
        "github.com/Dao-AILab/flash-attention/releases/tag/v2.8.3: pip fetches the wheel that fits",
        (_LINUX,),
        ((3, 9), (3, 13)),
        ((2, 4), (2, 8, 99)),
        ("12.1", "12.4", "12.6", "12.8", "12.9"),
    ),
    Prebuilt(
        "flash_attn_interface",
        "",
        "--no-deps flash-attn-3 --index-url https://download.pytorch.org/whl/cu{cuda}",
        "github.com/NVIDIA-NeMo/RL/issues/2148; release notes of xformers 0.0.35",
        (_LINUX,),
        ((3, 9), (3, 13)),
        ((2, 10), (2, 11, 99)),
        ("12.6", "13.0"),
    ),
    Prebuilt(
        "flash_attn.cute",
        "4.0.0b36",
        "--pre flash-attn-4",
        "PyPI, flash-attn-4: it is compiled when it is first used",
        (_LINUX,),
        ((3, 10), (3, 13)),
    ),
    Prebuilt("sageattention", "1.0.6", "sageattention==1.0.6", "PyPI, sageattention: Triton, no build"),
    Prebuilt(
        "sageattention",
        "2.2.0",
        _SAGE_WHEEL,
        "github.com/woct0rdho/SageAttention/releases/tag/v2.2.0-windows.post4",
        (_WINDOWS,),
        torch=((2, 9), (99,)),
        cuda=("12.8", "13.0"),
    ),
    Prebuilt("comfy_kitchen", "0.2.40", '--upgrade "comfy-kitchen>=0.2.40"', "PyPI, comfy-kitchen"),
    *_triton((2, 7), 3),
    *_triton((2, 8), 4),
    *_triton((2, 9), 5),
    *_triton((2, 10), 6),
    Prebuilt("triton", "3.6", '"triton==3.6.*"', "torch's own requirement", (_LINUX,), torch=((2, 11), (2, 11, 99))),
)

# What to know before building from source: (import name, OS or "" for all) → words.
BUILDING = {
    ("sageattn3", "Windows"): "Its build is known to fail on Windows with error C2872 ('std': ambiguous symbol).",
}
