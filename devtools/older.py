"""diffusers in a version beside the one in .venv: a folder of its own, found first by the Python that is given it."""

import os
import shutil
from pathlib import Path

from . import CACHE, ROOT, pip
from .say import step
from .venv import Venv

OLDEST = "0.35.2"
SAME = {"test_diffusers_memory.py"}  # it has nothing of diffusers but the name
# They start processes or compile, and take minutes: not in every run of the whole suite.
SLOW = {f"test_diffusers_{name}.py" for name in ("lifetime", "packages", "parallel", "run")}


def tests(whole: bool = True) -> list[str]:
    """The test files that another version may change, as pytest wants them; not `whole`: without the slow ones."""
    without = SAME if whole else SAME | SLOW
    return [
        f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_diffusers*.py")) if path.name not in without
    ]


def obtain(venv: Venv, version: str, cache: Path = CACHE) -> Path:
    """Return the folder that holds diffusers `version` alone; what it needs is in `venv` already. Raises Stop."""
    folder = cache / "diffusers" / version
    if not folder.exists():
        step(f"Installing diffusers {version} into {folder}")
        unfinished = folder.with_name(folder.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        wanted = ["install", "--no-deps", "--target", str(unfinished), f"diffusers=={version}"]
        pip.run(venv.folder, wanted, cache, "diffusers")
        os.replace(unfinished, folder)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment in which Python takes diffusers from `folder`."""
    before = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), before]))}
