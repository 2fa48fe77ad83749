"""The archive that the Comfy Registry gives to users: `comfy node validate`, `comfy node pack`, unpacked and run."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.loading import ROOT
from support.workflows import TWO_STAGES, read, small

FOLDER = "comfyui-attune"  # where ComfyUI Manager unpacks it: the project's name


def comfy_node(folder: Path, command: str, home: Path) -> str:
    """`comfy node <command>` in `folder`; returns what it says. `home`: where it keeps its settings."""
    own = {name: str(home) for name in ("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "XDG_CONFIG_HOME")}
    done = subprocess.run(
        [sys.executable, "-m", "comfy_cli", "--skip-prompt", "node", command],
        cwd=folder,
        env={**os.environ, **own, "DO_NOT_TRACK": "1", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The archive of what lies in this checkout, made in a repository of its own: comfy packs what git tracks."""
    home, copy = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("source") / "pack"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    for command in (["init", "-q"], ["add", "--all", "--force"]):
        subprocess.run(["git", *command], cwd=copy, check=True, capture_output=True)
    said = comfy_node(copy, "validate", home)
    assert "All validation checks passed" in said and "warning" not in said.lower(), said
    comfy_node(copy, "pack", home)
    return copy / "node.zip"


def test_it_holds_the_pack_and_not_what_developers_need(archive):
    names = zipfile.ZipFile(archive).namelist()
    top = {name.split("/")[0] for name in names}
    assert {"__init__.py", "attention", "kernels", "nodes", "web", "locales", "workflows", "LICENSE"} <= top
    # The README links to results; the programs need the tests, as every other tool of developers.
    assert {Path(name).suffix for name in names if name.startswith("benchmarks/")} == {".json", ".md"}
    assert not top & {"tests", "devtools", "dev.py", ".ci", ".venv", ".cache", ".git"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".mp4", ".safetensors"))]
    assert archive.stat().st_size < 3_000_000


def test_it_works_when_it_is_unpacked(archive, make_server, tmp_path):
    pack = tmp_path / "custom nodes 节点" / FOLDER
    zipfile.ZipFile(archive).extractall(pack)
    server = make_server(pack=pack)
    ours = {name for name, info in server.object_info().items() if info["python_module"] == f"custom_nodes.{FOLDER}"}
    assert ours >= {"AttentionSelector", "SDPAForce", "Sage3Switch", "AttentionRule", "ReleaseModel"}
    result = server.run(small(server, read(TWO_STAGES[0]), seed=1))
    assert [run["status"] for run in result.runs] == ["finished", "finished"]
    assert "attune" in server.get("/i18n")["zh"]
    assert FOLDER in server.get("/workflow_templates"), "its workflows are among the templates"
    server.stop()
