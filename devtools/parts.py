"""What is installed into .venv, in the order of installation."""

from pathlib import Path

from . import ROOT
from .venv import Part

TORCH = Part("torch", ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"), "PyTorch 2.11.0 (large)")
CONVERTER = "comfy-cli==1.23.0"


def comfyui(folder: Path) -> Part:
    """What the ComfyUI in `folder` needs, and the converter of its workflows; torch stays as pinned above."""
    lines = (folder / "requirements.txt").read_text("utf-8").splitlines()
    return Part("comfyui", (*TORCH.requirements, *_requirements(lines), CONVERTER), "what ComfyUI needs")


def tests() -> Part:
    """The tools of the test suite; torch stays as pinned above."""
    lines = (ROOT / "tests" / "requirements.txt").read_text("utf-8").splitlines()
    return Part("tests", (*TORCH.requirements, *_requirements(lines)), "the tools of the tests")


def _requirements(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
