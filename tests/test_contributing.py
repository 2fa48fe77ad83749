"""CONTRIBUTING.md, "Add a kernel in one file": its steps, done with its code, in a copy of the pack."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_attune.kernels import KERNELS
from support.loading import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
NAME = "blocks_of_256"
CODE = ("attention", "doctor", "host", "kernels", "measure", "nodes", "pipelines", "graphs")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the pack's code with the file of the page in it: step 1."""
    folder = tmp_path_factory.mktemp("contributed") / "a pack"
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for part in CODE:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    assert "**1. Write `kernels/mine.py`.**" in PAGE
    (folder / "kernels" / "mine.py").write_text(PAGE.partition("```python\n")[2].partition("```")[0], "utf-8")
    return folder


def attune(pack: Path, *arguments: str) -> str:
    command = [sys.executable, "-B", str(pack), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_listed_and_may_be_chosen(pack: Path) -> None:
    rows = {row["name"]: row for row in json.loads(attune(pack, "kernels", "--json"))}
    assert rows[NAME]["status"] == "available" and rows[NAME]["title"] == "PyTorch, 256 queries at a time"
    here = [name for name in rows if name in {kernel.name for kernel in KERNELS}]
    assert here == [kernel.name for kernel in KERNELS] and list(rows).index(NAME) > list(rows).index(here[-1])
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('comfyui_attune', r'{pack / '__init__.py'}',"
        f" submodule_search_locations=[r'{pack}'])\n"
        "sys.modules['comfyui_attune'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sys.modules['comfyui_attune'])\n"
        "from comfyui_attune import kernels\n"
        "from comfyui_attune.attention.policy import KERNEL_NAMES, Rule\n"
        f"print(Rule(({NAME!r},)).kernels[0], KERNEL_NAMES[-1])\n"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [NAME, NAME], done.stderr


def test_the_doctor_proves_it(pack: Path, tmp_path: Path) -> None:
    found = json.loads(attune(pack, "doctor", "--json", "--home", str(tmp_path)))
    (row,) = (each["verdict"] for each in found["kernels"] if each["name"] == NAME)
    assert row["outcome"] == "works" and row["error"] <= row["allowed"] and row["calls"] > 5


def test_it_is_measured(pack: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    shown = ("--shapes", "smoke", "--seconds", "0.02", "--json", str(file), "--home", str(tmp_path))
    attune(pack, "bench", "--kernels", f"{NAME},sdpa", *shown)
    rows = json.loads(file.read_text("utf-8"))["rows"]
    ran = {row["kernel"] for row in rows if row["status"] == "measured"}
    assert ran == {NAME, "sdpa"}, rows[:2]
