"""The rules of the house: which way imports run, what importing the pack may do, and what may not be in the tree."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.loading import ROOT

FOLDERS = ("attention", "kernels", "host", "nodes", "pipelines", "doctor", "measure", "graphs", "web", "workflows")
KERNEL_PACKAGES = {"xformers", "flash_attn", "flash_attn_interface", "sageattention", "sageattn3", "comfy_kitchen"}
HOST_PACKAGES = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "server",
    "nodes",
    "execution",
}

# Who may import what of the pack. `attention` knows nobody; only host, nodes and cli join the parts.
ALLOWED = {
    "attention": {"attention"},
    "kernels": {"attention", "kernels"},
    "doctor": {"attention", "doctor"},
    "measure": {"attention", "measure"},
    "graphs": {"attention", "measure", "graphs"},
    "host": {"attention", "kernels", "doctor", "measure", "host"},
    "nodes": {"attention", "host", "nodes"},
    "pipelines": {"attention", "kernels", "doctor", "measure", "host", "pipelines"},
}
# What scripts with diffusers share with ComfyUI, as it needs nothing of it: verdicts, runs, and what is kept on disk.
WITHOUT_COMFYUI = {"host.memory", "host.remembered", "host.run_files", "host.runs", "host.timings", "host.verdicts"}
# Inside attention/, imports run one way.
ORDER = [
    "call", "builds", "driver", "machine", "kernel", "listing", "policy", "plan", "timings", "prepare", "clock",
    "history", "entries", "record", "account", "link", "guard", "route", "shadow", "trial", "tuner", "check", "session",
    "compiled", "routing", "router", "chained", "healing",
]  # fmt: skip
TYPES_ONLY = {("session", "router"), ("routing", "router"), ("guard", "route"), ("route", "trial"), ("trial", "tuner")}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute name inside or outside the pack, is it relative?) of every import in a file, at any depth."""
    found = []
    package = list(path.relative_to(ROOT).parent.parts)
    for item in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(item, ast.Import):
            found += [(alias.name, False) for alias in item.names]
        elif isinstance(item, ast.ImportFrom) and not item.level:
            found.append((item.module or "", False))
        elif isinstance(item, ast.ImportFrom):
            base = package[: len(package) - item.level + 1]
            inner = [item.module] if item.module else [alias.name for alias in item.names]
            found += [(".".join([*base, name]), True) for name in inner]
    return found


@pytest.mark.parametrize("folder", [folder for folder in ALLOWED if (ROOT / folder).is_dir()])
def test_imports_run_one_way(folder):
    for path in modules(folder):
        for name, relative in imports(path):
            top = name.split(".")[0]
            if relative:
                assert top in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"
            else:
                assert top != "comfyui_attune", f"{path.relative_to(ROOT)} must import the pack relatively"
                if folder not in ("host", "nodes"):
                    assert top not in HOST_PACKAGES, f"{path.relative_to(ROOT)} imports the host ({name})"
                if folder == "attention":
                    assert top == "torch" or top in sys.stdlib_module_names, f"{path.relative_to(ROOT)}: {name}"


def test_inside_attention_imports_run_one_way():
    for place, name in enumerate(ORDER):
        for imported, relative in imports(ROOT / "attention" / f"{name}.py"):
            module = imported.removeprefix("attention.")
            if relative and (name, module) not in TYPES_ONLY:
                assert ORDER.index(module) < place, f"{name} imports {module}"


def test_pipelines_need_no_comfyui_and_nobody_else_needs_diffusers():
    for path in modules("pipelines"):
        for name, relative in imports(path):
            module = ".".join(name.split(".")[:2])
            assert not (relative and name.startswith("host")) or module in WITHOUT_COMFYUI, f"{path} imports {name}"
    for module in WITHOUT_COMFYUI:
        for name, relative in imports(ROOT / f"{module.replace('.', '/')}.py"):
            assert name.split(".")[0] not in HOST_PACKAGES, f"{module} imports {name}"
            own = ".".join(name.split(".")[:2])
            assert not (relative and name.startswith("host")) or own in WITHOUT_COMFYUI, f"{module} imports {name}"
    for folder in FOLDERS:
        for path in modules(folder) if folder != "pipelines" else ():
            assert not any(name.split(".")[0] == "diffusers" for name, _ in imports(path)), path


def test_one_folder_only_has_a_name_that_comfyui_serves_templates_from():
    """It would serve the first of them, and the templates of the other could not be opened (custom_node_manager.py)."""
    names = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert [name for name in names if (ROOT / name).exists()] == ["workflows"]


def test_only_absolute_imports_of_others_and_never_the_root_on_the_path():
    for folder in FOLDERS:
        for path in modules(folder):
            if path.name != "run_script.py":  # it puts the folder of somebody's script there, as Python does
                assert "sys.path" not in path.read_text("utf-8"), path


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location(
    "comfyui_attune", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}])
package = importlib.util.module_from_spec(spec)
sys.modules["comfyui_attune"] = package
spec.loader.exec_module(package)
"""


def test_importing_the_pack_imports_nothing_heavy():
    loaded = json.loads(run_python(LOAD + "print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "numpy", "comfy"}.intersection(loaded)


def test_importing_every_kernel_imports_no_kernel_package_and_starts_no_gpu():
    code = LOAD + (
        "import comfyui_attune.kernels, torch\nprint(json.dumps([sorted(sys.modules), torch.cuda.is_initialized()]))"
    )
    loaded, started = json.loads(run_python(code))
    assert not KERNEL_PACKAGES.intersection(loaded)
    assert not started


def test_files_stay_small_enough_to_read():
    wide = {
        str(path.relative_to(ROOT)): lines
        for folder in (*FOLDERS, "benchmarks")
        for path in modules(folder)
        if (lines := len(path.read_text("utf-8").splitlines())) > 300
    }
    assert not wide, f"these files are asking to be two: {wide}"


def test_the_command_line_lists_every_kernel_with_its_reasons():
    done = subprocess.run(
        [sys.executable, str(ROOT), "kernels", "--json"], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert all(list(row) == ["name", "title", "package", "precision", "status", "reasons", "verdict"] for row in rows)
    by_name = {row["name"]: row for row in rows}
    from comfyui_attune.attention.policy import FAMILIES, KERNEL_NAMES

    assert set(by_name) == set(KERNEL_NAMES) - set(FAMILIES) - {"auto", "auto_fast", "host"}
    assert by_name["sdpa"]["status"] == by_name["split"]["status"] == "available"
    assert all(bool(row["reasons"]) is (row["status"] != "available") for row in rows)


def test_no_node_class_hides_in_the_tests():
    """ComfyUI-Manager scans every tracked .py file for node classes."""
    for path in (ROOT / "tests").rglob("*.py"):
        if "fixture_packs" in path.parts:
            continue
        for item in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(item, ast.ClassDef):
                assert not any("ComfyNode" in ast.unparse(base) for base in item.bases), path


def test_the_manager_finds_every_node_by_scanning_the_source():
    """Class name == node_id, a direct base named ComfyNode, and a literal node_id in a call named Schema."""
    found = {}
    for path in modules("nodes"):
        for item in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(item, ast.ClassDef) and any(ast.unparse(base).endswith("ComfyNode") for base in item.bases):
                ids = re.findall(r"Schema\(\s*node_id=\"(\w+)\"", ast.get_source_segment(path.read_text("utf-8"), item))
                found[item.name] = ids
    assert found and all(ids == [name] for name, ids in found.items()), found
    assert set(found) >= {"AttentionSelector", "SDPAForce", "Sage3Switch", "AttentionRule"}


def test_the_version_is_the_same_in_both_places():
    """The registry and ComfyUI Manager read it from pyproject.toml, and take no dynamic one."""
    import comfyui_attune

    (told,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert told == comfyui_attune.__version__
