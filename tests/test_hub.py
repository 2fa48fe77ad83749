"""`attune get`: kernels of the Hugging Face Hub, from a folder in its layout. No test uses the network."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_attune.attention.kernel import machine_reasons
from comfyui_attune.attention.machine import Architecture, Device, Fetched, Machine, offer_fetched, read_machine
from comfyui_attune.cli import main
from comfyui_attune.doctor import get_command, hub_fetch
from comfyui_attune.doctor.hub import (
    OFFERS,
    Here,
    HubError,
    Record,
    announce,
    fetched,
    folder,
    here,
    mismatch,
    offer,
    records,
)
from comfyui_attune.doctor.hub_fetch import Hub, fetch
from comfyui_attune.kernels import KERNELS, _common
from support.loading import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNIVERSAL = "torch-universal"
KERNEL = {kernel.name: kernel for kernel in KERNELS}
HOPPER = Machine(devices=(Device("cuda:0", "NVIDIA H100", Architecture.HOPPER, (9, 0)),), cuda="13.0", triton="3.6")
LINUX = Here("2.11", "13.0", "linux", "x86_64")

SOURCE = """
    import torch

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2), None
"""
# The package's get_local_kernel, with its signature and what it does for one build below build/.
LOADER = """
    import importlib.util, json, sys

    def get_local_kernel(repo_path, *, backend=None, trust_remote_code=False, user_agent=None):
        (build,) = (repo_path / "build").iterdir()
        name = json.loads((build / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
"""


def make_build(root: Path, variant: str = UNIVERSAL, source: str = SOURCE, **metadata) -> Path:
    """A repository in the Hub's layout with one build in pure Python."""
    build = root / "build" / variant
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(textwrap.dedent(source), "utf-8")
    digest = base64.b64encode(hashlib.sha256((build / "__init__.py").read_bytes()).digest()).decode()
    data = {
        "name": "flash-attn3",
        "id": f"flash_attn3_{abs(hash(root))}",
        "version": 1,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": {"__init__.py": digest}},
        **metadata,
    }
    (build / "metadata.json").write_text(json.dumps(data), "utf-8")
    return root


def install_package(site: Path, source: str) -> None:
    """A package `kernels` as pip leaves one."""
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(textwrap.dedent(source), "utf-8")
    (site / "kernels-0.17.2.dist-info").mkdir()
    (site / "kernels-0.17.2.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.17.2\n", "utf-8")


class FolderHub(Hub):
    """The Hub's answers, from a folder. `spoil` is called with the target after each download."""

    def __init__(self, root: Path, spoil=lambda target, pattern: None) -> None:
        self.root, self.spoil, self.asked = root, spoil, []

    def revision(self, repo):
        self.asked.append(repo)
        return "v1", COMMIT

    def variants(self, repo, commit):
        names = [path.name for path in (self.root / "build").iterdir()]
        return sorted(((name, mismatch(name, LINUX)) for name in names), key=lambda pair: pair[1] != "")

    def sizes(self, repo, commit, variant):
        files = (path for path in (self.root / "build" / variant).rglob("*") if path.is_file())
        return {path.relative_to(self.root).as_posix(): path.stat().st_size for path in files}

    def download(self, repo, commit, pattern, target):
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            if path.is_file() and (name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
        self.spoil(target, pattern)


@pytest.fixture
def home(tmp_path, monkeypatch):
    place = tmp_path / "zu Hause é"
    monkeypatch.setenv("ATTUNE_HOME", str(place))
    return place


@pytest.fixture
def repo(tmp_path):
    return make_build(tmp_path / "repo")


@pytest.fixture(autouse=True)
def nothing_offered():
    yield
    offer_fetched({})
    _common._from_folder.cache_clear()


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """The real package where it is installed, else a stand-in of the function that loads."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        install_package(tmp_path / "site", LOADER)
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.delitem(sys.modules, "kernels", raising=False)
        yield
        sys.modules.pop("kernels", None)
    else:
        yield


def yes(_found):
    return True


def left_in(home: Path) -> list[str]:
    """Everything in the home folder that is a file."""
    return sorted(path.name for path in home.rglob("*") if path.is_file() or path.name.startswith(".part"))


def test_what_is_fetched_is_recorded_and_lies_in_a_folder_of_its_commit_and_build(home, repo):
    record = fetch("flash3", home, FolderHub(repo), yes)
    assert record == Record("kernels-community/flash-attn3", COMMIT, UNIVERSAL, "BSD-3-Clause", record.size)
    assert records(home).read() == {"flash3": record}
    assert (folder(home, record) / "build" / UNIVERSAL / "__init__.py").read_bytes() == (
        repo / "build" / UNIVERSAL / "__init__.py"
    ).read_bytes()
    assert left_in(home) == ["__init__.py", "fetched.json", "metadata.json"]
    assert fetched(home) == {"flash3": Fetched(str(folder(home, record)))}
    # Once more is the same again.
    assert fetch("flash3", home, FolderHub(repo), yes, COMMIT) == record


@pytest.mark.parametrize("stage", ["metadata.json", "*"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError, OSError])
def test_an_interrupted_download_leaves_nothing(home, repo, stage, error):
    def spoil(target, pattern):
        if pattern.endswith(stage):
            raise error("in the middle")

    with pytest.raises(error):
        fetch("flash3", home, FolderHub(repo, spoil), yes)
    assert left_in(home) == [] and fetched(home) == {}


@pytest.mark.parametrize("spoiling", ["missing", "short", "changed"])
def test_a_download_that_is_not_complete_is_thrown_away(home, repo, spoiling):
    def spoil(target, pattern):
        file = target / "build" / UNIVERSAL / "__init__.py"
        if pattern.endswith("*"):
            data = file.read_bytes()
            file.unlink()
            if spoiling != "missing":
                file.write_bytes(data[:-1] + (b"#" if spoiling == "changed" else b""))

    with pytest.raises(HubError, match=r"__init__\.py is not"):
        fetch("flash3", home, FolderHub(repo, spoil), yes)
    assert left_in(home) == []


def test_a_download_whose_process_was_killed_is_removed_by_a_later_one(home, repo):
    old, new = home / "hub" / ".part-old", home / "hub" / ".part-new"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (1, 1))
    fetch("flash3", home, FolderHub(repo), yes)
    assert not old.exists() and new.exists()


def test_builds_that_do_not_match_are_refused_with_their_reasons(home, tmp_path):
    root = make_build(tmp_path / "other", "torch29-cxx11-cu128-x86_64-linux")
    make_build(tmp_path / "other", "torch211-cu130-aarch64-linux")
    with pytest.raises(HubError, match="No build of") as raised:
        fetch("flash3", home, FolderHub(root), yes)
    assert "torch 2.9, this is torch 2.11" in str(raised.value)
    assert "linux on aarch64, this is linux on x86_64" in str(raised.value)
    assert not home.exists()


@pytest.mark.parametrize(
    ("variant", "machine", "reason"),
    [
        (UNIVERSAL, LINUX, ""),
        ("torch-cuda", LINUX, ""),
        ("torch-cuda", replace(LINUX, cuda=None), "without CUDA"),
        ("torch-cpu", LINUX, "built for CPU"),
        ("torch211-cxx11-cu130-x86_64-linux", LINUX, ""),
        ("torch211-cu126-x86_64-windows", replace(LINUX, system="windows"), "CUDA 12.6"),
        ("torch211-cu132-x86_64-linux", LINUX, "CUDA 13.2"),
        ("torch211-cu128-x86_64-linux", replace(LINUX, cuda="12.9"), ""),
        ("torch210-cu130-x86_64-linux", LINUX, "torch 2.10, this is torch 2.11"),
        ("torch-stable-abi29-cu130-x86_64-linux", LINUX, ""),
        ("torch-stable-abi212-cu130-x86_64-linux", LINUX, "torch 2.12 or newer"),
        ("torch211-cu130-x86_64-linux", replace(LINUX, system="windows"), "this is windows"),
        ("torch211-cu130-x86_64-linux", replace(LINUX, free_threaded=True), "interpreter lock"),
        ("torch211-cpu-x86_64-linux", LINUX, "built for CPUs"),
        ("jax1-cu130", LINUX, "not known"),
    ],
)
def test_a_build_tells_by_its_name_what_it_runs_on(variant, machine, reason):
    found = mismatch(variant, machine)
    assert (reason in found) if reason else not found


def test_what_was_fetched_is_refused_after_torch_has_changed_and_after_it_was_deleted(home, tmp_path):
    variant = "torch211-cxx11-cu130-x86_64-linux"
    record = fetch("flash3", home, FolderHub(make_build(tmp_path / "compiled", variant)), yes)
    assert fetched(home, LINUX)["flash3"].refused == ""
    refused = fetched(home, replace(LINUX, torch="2.12"))["flash3"].refused
    assert "torch 2.11, this is torch 2.12" in refused and "`attune get flash3`" in refused
    shutil.rmtree(folder(home, record))
    assert "no longer in" in fetched(home, LINUX)["flash3"].refused


def test_a_record_that_names_another_publisher_is_refused(home, repo):
    record = fetch("flash3", home, FolderHub(repo), yes)
    records(home).update(lambda state: state.update(flash3=replace(record, repo="somebody/flash-attn3")))
    assert "somebody/flash-attn3" in fetched(home)["flash3"].refused


def test_a_file_of_records_that_is_none_is_set_aside(home):
    home.mkdir()
    (home / "fetched.json").write_text(
        '{"kind": "attune fetched kernels", "schema": 1, "state": {"flash3": {"repo": 1}}}'
    )
    assert fetched(home) == {} and (home / "fetched.json.unreadable").exists()


@pytest.mark.parametrize("name", ["flash9", "", "sdpa", "sage2_fp8_cuda_pp", "kernels-community/flash-attn3"])
def test_an_unknown_name_is_answered_with_the_names(name):
    with pytest.raises(HubError, match="Wanted is one of flash2, flash3"):
        offer(name)


def test_nothing_is_fetched_from_others(capsys, home):
    assert main(["get", "somebody/flash-attn3", "--yes"]) == 1
    said = capsys.readouterr().err
    assert "somebody is not a trusted publisher" in said and "kernels-community only" in said
    assert all(entry.repo.startswith("kernels-community/") for entry in OFFERS.values()) and not home.exists()
    assert set(OFFERS) <= set(KERNEL)


@pytest.mark.parametrize("revision", ["main", "v1", "0123", "../../../etc"])
def test_only_a_commit_is_a_revision(home, repo, revision):
    with pytest.raises(HubError, match="is not a commit"):
        fetch("flash3", home, FolderHub(repo), yes, revision)


def test_a_build_without_the_function_is_not_kept(home, tmp_path):
    root = make_build(tmp_path / "empty", source="flash_attn_varlen_func = print\n")
    with pytest.raises(HubError, match="has no flash_attn_func"):
        fetch("flash3", home, FolderHub(root), yes)
    assert left_in(home) == []


def test_a_build_that_would_fetch_others_when_loaded_is_refused(home, tmp_path):
    depends = {"kernel-depends": [{"repo-id": "kernels-community/relu", "version": 1}]}
    with pytest.raises(HubError, match="further kernels"):
        fetch("flash3", home, FolderHub(make_build(tmp_path / "needy", **depends)), yes)


@pytest.mark.parametrize(("answer", "kept"), [("n", False), ("", False), ("y", True)])
def test_size_and_licence_are_shown_before_it_asks(home, repo, monkeypatch, capsys, answer, kept):
    monkeypatch.setattr(get_command, "Hub", lambda: FolderHub(repo))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(capsys.readouterr().out) or answer)
    assert main(["get", "flash3"]) == (0 if kept else 1)
    assert COMMIT in asked[0] and "BSD-3-Clause" in asked[0] and "KiB" in asked[0] and str(home) in asked[0]
    assert bool(fetched(home)) is kept and bool(left_in(home)) is kept


def test_without_a_terminal_nothing_is_fetched_but_with_yes(home, repo, monkeypatch, capsys):
    monkeypatch.setattr(get_command, "Hub", lambda: FolderHub(repo))
    monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"isatty": lambda self: False})())
    assert main(["get", "flash3"]) == 1 and "--yes" in capsys.readouterr().err and left_in(home) == []
    assert main(["get", "flash3", "--yes"]) == 0 and "was fetched" in capsys.readouterr().out
    assert main(["get"]) == 0
    listed = capsys.readouterr().out
    assert f"fetched: kernels-community/flash-attn3 at {COMMIT[:12]}, {UNIVERSAL}" in listed
    assert "not fetched; kernels-community/flash-attn2" in listed


def test_without_network_one_sentence_and_nothing_changed(home, monkeypatch, capsys):
    class Offline(FolderHub):
        def revision(self, repo):
            raise ConnectionError("no route to huggingface.co")

    monkeypatch.setattr(get_command, "Hub", lambda: Offline(home))
    assert main(["get", "flash3", "--yes"]) == 1
    assert capsys.readouterr().err == "ConnectionError: no route to huggingface.co\nNothing was fetched.\n"
    assert not home.exists()


def test_a_fetched_kernel_counts_as_installed_where_the_package_is_not():
    flash3, at = KERNEL["flash3"], {"flash3": Fetched("/somewhere")}
    assert "flash_attn_interface is not installed" in machine_reasons(flash3, HOPPER)[0]
    assert machine_reasons(flash3, replace(HOPPER, fetched=at)) == ()
    refused = replace(HOPPER, fetched={"flash3": Fetched("/somewhere", "built for torch 2.9")})
    assert machine_reasons(flash3, refused) == ("built for torch 2.9",)
    # The GPU is asked all the same, and an installed package comes first.
    ada = replace(refused, devices=(Device("cuda:0", "RTX 4090", Architecture.ADA, (8, 9)),), fetched=at)
    assert machine_reasons(flash3, ada) == ("needs sm_90, this GPU is sm_89 (Ada)",)
    assert machine_reasons(flash3, replace(refused, packages={"flash_attn_interface": "3.0"})) == ()


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("sage2_fp8_cuda", {"sageattention": "1.0.6"}),
        ("flash2", {"flash_attn": "", "flash_attn.cute": "4.0.0b36"}),
        ("flash4", {"flash_attn": "2.8.3", "flash_attn.cute": ""}),
    ],
)
def test_it_takes_the_place_of_another_package_of_the_same_name(name, packages):
    machine = replace(HOPPER, packages=packages)
    assert len(machine_reasons(KERNEL[name], machine)) == 1
    assert machine_reasons(KERNEL[name], replace(machine, fetched={name: Fetched("/somewhere")})) == ()


def test_the_adapter_loads_it_by_its_path(home, repo, loader):
    fetch("flash3", home, FolderHub(repo), yes)
    announce(home)
    q = torch.randn(1, 5, 2, 16)
    wanted = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)
    assert torch.equal(KERNEL["flash3"].load()(q, q, q), wanted)
    # The machine tells it to the planner, and through JSON to a child process that tries kernels.
    machine = read_machine()
    assert machine.fetched == fetched(home)
    through = json.loads(json.dumps(machine.fetched))
    assert machine_reasons(KERNEL["flash3"], replace(HOPPER, fetched=through)) == ()
    offer_fetched(through)
    assert read_machine().fetched == machine.fetched


def test_sage_functions_are_found_in_the_module_core_of_the_hubs_build(home, tmp_path, loader):
    source = """
        import types

        def sageattn_qk_int8_pv_fp16_cuda(q, k, v, tensor_layout, sm_scale, pv_accum_dtype):
            return q + (pv_accum_dtype == "fp32")

        core = types.SimpleNamespace(sageattn_qk_int8_pv_fp16_cuda=sageattn_qk_int8_pv_fp16_cuda)
        del sageattn_qk_int8_pv_fp16_cuda
    """
    fetch("sage2_fp16_cuda", home, FolderHub(make_build(tmp_path / "sage", source=source)), yes)
    offer_fetched(fetched(home))
    q = torch.zeros(1, 8, 1, 64)
    assert KERNEL["sage2_fp16_cuda"].load()(q, q, q).min() == 1
    offer_fetched({"sage3": fetched(home)["sage2_fp16_cuda"]})
    with pytest.raises(ImportError, match="has no sageattn3_blackwell"):
        KERNEL["sage3"].load()


def test_a_refused_build_is_not_loaded(loader):
    offer_fetched({"flash3": Fetched("/nowhere", "built for another torch")})
    with pytest.raises(ImportError, match="built for another torch"):
        KERNEL["flash3"].load()


def test_without_the_package_one_sentence_says_how_to_install_it(home, repo, monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert main(["get", "flash3", "--yes"]) == 1
    assert "is missing: pip install kernels" in capsys.readouterr().err
    fetch("flash3", home, FolderHub(repo), yes)
    offer_fetched(fetched(home))
    with pytest.raises(ImportError, match="pip install kernels"):
        KERNEL["flash3"].load()


@pytest.mark.parametrize("root", ["as a program", "as the current folder"])
def test_our_folder_kernels_and_the_package_are_never_taken_for_each_other(tmp_path, root):
    """With a package of that name installed, and our root where Python looks before it looks there."""
    install_package(tmp_path, "marker = 1\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "ATTUNE_HOME": str(tmp_path / "home")}
    if root == "as a program":
        command = [sys.executable, str(ROOT), "get", "flash3", "--yes"]
    else:
        code = (
            "import sys; sys.path.insert(0, ''); sys.path.insert(1, 'tests')\n"
            "from support.loading import ROOT, load_package\n"
            "load_package('comfyui_attune', ROOT)\n"
            "from comfyui_attune.cli import main; from comfyui_attune.kernels import KERNELS\n"
            "sys.exit(main(['get', 'flash3', '--yes']))"
        )
        command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert f"{tmp_path / 'kernels' / '__init__.py'} is not the package that loads" in done.stderr


def test_the_hubs_own_package_takes_the_calls_that_are_made_of_it():
    api = pytest.importorskip("huggingface_hub").HfApi
    inspect.signature(api.list_repo_refs).bind(api, "a/b", repo_type="kernel")
    inspect.signature(api.list_repo_tree).bind(
        api, "a/b", "build/x", recursive=True, revision=COMMIT, repo_type="kernel"
    )
    inspect.signature(api.snapshot_download).bind(
        api, "a/b", repo_type="kernel", revision=COMMIT, allow_patterns=["*"], ignore_patterns=["*"], local_dir="x"
    )


def test_this_machine_is_described_as_builds_are(monkeypatch):
    found = here()
    assert torch.__version__.startswith(found.torch + ".") and found.cuda == torch.version.cuda
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    assert here().cpu == "x86_64" and hub_fetch.Hub is Hub
