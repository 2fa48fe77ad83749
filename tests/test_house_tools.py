"""ruff, mypy and the wheel: what every change has to pass before somebody reads it."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.loading import ROOT

CACHE = ROOT / ".cache"
# What a checkout holds besides its own sources.
FOREIGN = shutil.ignore_patterns(".git", ".venv", ".cache", "__pycache__", "build", "*.egg-info", "*.mp4", "*.png")


def run(*command, cwd=ROOT, **env):
    """Run a tool with this Python; a failure shows what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def test_ruff_finds_nothing():
    run("-m", "ruff", "check", ".")


def test_ruff_would_format_nothing():
    run("-m", "ruff", "format", "--check", "--diff", ".")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A folder with the pack installed from its wheel and nothing else. Built from a copy: builds leave traces."""
    copy, target = tmp_path_factory.mktemp("source") / "pack", CACHE / "wheel"
    shutil.copytree(ROOT, copy, ignore=FOREIGN)
    shutil.rmtree(target, ignore_errors=True)
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", target, copy)
    return target


def test_the_wheel_holds_the_whole_pack_and_nothing_else(wheel):
    packed = {path.relative_to(wheel / "comfyui_attune").as_posix() for path in (wheel / "comfyui_attune").rglob("*")}
    folders = [
        "attention",
        "kernels",
        "host",
        "pipelines",
        "nodes",
        "doctor",
        "measure",
        "graphs",
        "locales",
        "web",
        "workflows",
    ]
    kinds = {".py", ".js", ".css", ".json", ".typed"}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
    }
    wanted |= {"__init__.py", "__main__.py", "cli.py"}
    found = {path for path in packed if Path(path).suffix in kinds}
    assert found == wanted
    assert sorted(path.name for path in wheel.iterdir() if path.name != "bin") == [
        "comfyui_attune",
        f"comfyui_attune-{importlib.metadata.Distribution.at(next(wheel.glob('*.dist-info'))).version}.dist-info",
    ]


def test_the_wheel_works_without_comfyui(wheel, tmp_path):
    said = run("-m", "comfyui_attune", "kernels", "--json", cwd=tmp_path, PYTHONPATH=str(wheel))
    assert {"name", "title", "package", "precision", "status", "reasons"} <= json.loads(said)[0].keys()


def test_the_wheel_brings_the_command_and_needs_torch_only(wheel):
    installed = importlib.metadata.Distribution.at(next(wheel.glob("*.dist-info")))
    assert [(entry.name, entry.value) for entry in installed.entry_points] == [("attune", "comfyui_attune.cli:main")]
    assert [line for line in installed.requires or [] if "extra ==" not in line] == ["torch>=2.4"]


def test_mypy_finds_nothing_in_the_heart_and_the_kernels(wheel):
    packages = ["-p", "comfyui_attune.attention", "-p", "comfyui_attune.kernels"]
    # mypy needs a package of this name: a checkout's folder may have any.
    run("-m", "mypy", "--config-file", ROOT / "pyproject.toml", *packages, cwd=wheel, MYPYPATH=str(wheel))
