"""The files that the doctor keeps: unreadable ones, folders that cannot be written, and several processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from comfyui_attune.doctor import probe, quarantine
from comfyui_attune.doctor import store as module
from comfyui_attune.doctor.kernel_verdict import KernelVerdict
from comfyui_attune.doctor.verdict import Verdict
from support.loading import ROOT


def keep_quarantined(state, key):
    state.keep(f"package {key}", key, Verdict("crashed", key))


def keep_verdict(state, key):
    state.setdefault(f"kernel {key}", {})[key] = KernelVerdict("works", key)


KINDS = {
    "quarantine": (quarantine.store, keep_quarantined, lambda state: {k for v in state.verdicts.values() for k in v}),
    "verdicts": (probe.store, keep_verdict, lambda state: {key for kept in state.values() for key in kept}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def file(kind, tmp_path):
    return KINDS[kind][0](tmp_path / "user ä" / "attune")


@pytest.fixture
def add(kind, file):
    """add(key): an update of the file that adds something under this key; True where it was written."""
    return lambda key: file.update(lambda state: KINDS[kind][1](state, key))


@pytest.fixture
def keys(kind, file):
    """The keys of what is in the file."""
    return lambda: KINDS[kind][2](file.read())


def content(file, **changes) -> bytes:
    return json.dumps({"kind": file.kind, "schema": file.schema, "state": {}, **changes}).encode()


@pytest.mark.parametrize(
    "make",
    [
        lambda file: content(file)[:-9],
        lambda file: b"\x00\xff\xfe\x80 not text",
        lambda file: b"",
        lambda file: b"null",
        lambda file: b"[" * 100_000,
        lambda file: content(file, schema=99),
        lambda file: content(file, kind="somebody's"),
        lambda file: content(file, state=[1]),
        lambda file: content(file, state={"verdicts": [], "added": 1, "lifted": []}),
        lambda file: content(file, state={"verdicts": {"a": {"b": {"c": 1}}}, "added": [], "lifted": []}),
        lambda file: content(file, state={"sdpa": {"key": {"error": 1.0}}}),
        lambda file: content(file, state={"sdpa": {"key": 3}}),
    ],
    ids=[
        "truncated", "binary", "empty", "null", "too deep", "foreign schema", "foreign kind", "a list", "wrong types",
        "no verdict", "no outcome", "a number",
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_set_aside_with_one_warning_and_begun_anew(file, add, keys, caplog, make):
    file.path.parent.mkdir(parents=True)
    file.path.write_bytes(make(file))
    assert keys() == set()
    assert len(caplog.messages) == 1 and str(file.path) in caplog.text
    assert file.path.with_name(f"{file.path.name}.unreadable").read_bytes() == make(file)
    assert add("new") and keys() == {"new"}
    assert len(caplog.messages) == 1


def test_a_file_in_the_way_of_the_folder_is_a_warning(file, add, keys, caplog):
    file.path.parent.parent.mkdir()
    file.path.parent.write_text("not a folder")
    assert not add("lost")
    assert "cannot be written" in caplog.messages[-1] and "ATTUNE_HOME" in caplog.messages[-1]
    assert keys() == set()


def test_a_folder_in_the_way_of_the_file_is_a_warning(file, add, keys, caplog):
    (file.path / "inside").mkdir(parents=True)
    assert keys() == set() and "cannot be read" in caplog.messages[-1]
    assert not add("lost") and "cannot be written" in caplog.messages[-1]
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


def test_a_folder_that_only_lets_read_keeps_what_was_there_and_costs_no_time(file, add, keys, caplog, monkeypatch):
    """Every call that makes a file is refused, as on a folder that is read-only for this user, on every system."""
    add("old")

    def refuse(*_arguments, **_keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(module, "PATIENCE", 60)
    started = time.monotonic()
    assert not add("new")
    assert time.monotonic() - started < 30, "it waited"
    assert len(caplog.messages) == 1 and "cannot be written" in caplog.text
    monkeypatch.undo()
    assert keys() == {"old"}


def test_a_file_that_another_process_has_open_is_read_a_moment_later(add, keys, caplog, monkeypatch):
    """Windows refuses it then, and nothing may be taken for empty and written over."""
    add("old")
    real, refusals = Path.read_text, iter([True, True, False])

    def read(path, *arguments, **keywords):
        if path.suffix == ".json" and next(refusals, False):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", read)
    assert add("new") and keys() == {"old", "new"} and not caplog.messages


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="only there is a folder read-only, and root writes")
def test_a_real_read_only_folder(file, add, keys, caplog):
    add("old")
    file.path.parent.chmod(0o500)
    try:
        assert not add("new") and "cannot be written" in caplog.text
        assert keys() == {"old"}
    finally:
        file.path.parent.chmod(0o700)


WRITER = f"""
import importlib, json, pathlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from support.loading import ROOT, load_package
load_package("comfyui_attune", ROOT)
tests = importlib.import_module("test_store")
make, keep, _ = tests.KINDS[sys.argv[1]]
file = make(pathlib.Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for count in range(50):
    assert file.update(lambda state: keep(state, f"{{sys.argv[3]}} {{count}}"))
"""


def test_two_processes_at_once_lose_nothing_and_the_file_is_whole_all_the_time(kind, file, keys, monkeypatch):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, kind, str(file.path.parent), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout.readline() == "ready\n", writer.stderr.read()
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        time.sleep(0.005)  # On Windows nobody can write while it is being read.
        try:
            text = file.path.read_text("utf-8")
        except OSError:  # not there yet; on Windows also: being replaced right now
            continue
        seen.add(len(json.loads(text)["state"]["verdicts"] if kind == "quarantine" else json.loads(text)["state"]))
    for writer in writers:
        assert (writer.communicate()[1], writer.returncode) == ("", 0)
    assert keys() == {f"{name} {count}" for name in ("one", "two") for count in range(50)}
    assert len(seen) > 1  # it was read while they wrote
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


def test_threads_lose_nothing_either(add, keys):
    threads = [threading.Thread(target=lambda n=n: [add(f"{n} {count}") for count in range(20)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys() == {f"{n} {count}" for n in range(4) for count in range(20)}


# The lock


@pytest.fixture
def lock(file):
    """The lock of a process that does not give it back."""
    file.path.parent.mkdir(parents=True)
    path = file.path.with_name(f"{file.path.name}.lock")
    path.touch()
    return path


@pytest.mark.parametrize("seconds", [-60, 60])
def test_the_lock_of_a_process_that_died_is_removed(add, keys, lock, seconds, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 60)
    os.utime(lock, (time.time() + seconds,) * 2)
    started = time.monotonic()
    assert add("new") and keys() == {"new"}
    assert time.monotonic() - started < 30 and not lock.exists()


def test_a_lock_that_stays_delays_an_update_and_does_not_prevent_it(add, keys, lock, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    started = time.monotonic()
    assert add("new") and keys() == {"new"}
    assert 0.3 <= time.monotonic() - started < 30
    assert lock.exists()  # it is somebody else's


def test_a_process_that_ends_in_the_middle_of_an_update_holds_nobody_up_for_long(kind, file, add, keys, monkeypatch):
    code = WRITER.replace("keep(state,", "__import__('os')._exit(7) if count == 3 else keep(state,")
    done = subprocess.run([sys.executable, "-c", code, kind, str(file.path.parent), "one"], input="go\n", text=True)
    assert done.returncode == 7
    assert file.path.with_name(f"{file.path.name}.lock").exists()
    monkeypatch.setattr(module, "ABANDONED", 0.1)
    time.sleep(0.2)
    assert add("new") and keys() == {"one 0", "one 1", "one 2", "new"}


def test_a_change_that_raises_leaves_the_file_and_no_lock(file, add, keys):
    add("old")
    with pytest.raises(ZeroDivisionError):
        file.update(lambda _state: 1 / 0)
    assert keys() == {"old"}
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]
