"""`attune cache`: sizes, places, and nothing deleted that is not a cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_attune.doctor.caches import Cache, LeftAloneError, triton_folder
from comfyui_attune.doctor.quarantine import store
from comfyui_attune.doctor.verdict import Verdict
from support.loading import ROOT

ENTRY = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567ABCDEFGHIJKLMNOPQRST"


@pytest.fixture
def places(tmp_path):
    """(the pack's home, Triton's cache with one entry and other people's files beside it, the environment)."""
    home, triton = tmp_path / "zu Hause é", tmp_path / "triton cache"
    (triton / ENTRY).mkdir(parents=True)
    (triton / ENTRY / "kernel.cubin").write_bytes(b"x" * 3000)
    (triton / "thesis.txt").write_text("mine", "utf-8")
    (triton / "photos").mkdir()
    home.mkdir()
    return home, triton, {**os.environ, "ATTUNE_HOME": str(home), "TRITON_CACHE_DIR": str(triton)}


def run(env, *arguments, answer=""):
    command = [sys.executable, str(ROOT), "cache", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, input=answer, check=False)


def test_show_names_sizes_and_places(places):
    home, triton, env = places
    (home / "timings.json").write_bytes(b"0" * 2048)
    text = run(env, "show").stdout
    if triton_folder() is not None:
        assert f"2.9 KiB  {triton}" in text
    assert f"2.0 KiB  {home / 'timings.json'}" in text
    assert "empty" in text


@pytest.mark.skipif(triton_folder() is None, reason="Triton is not installed here")
def test_only_tritons_own_entries_are_deleted(places):
    _, triton, env = places
    done = run(env, "clear", "--triton", "--yes")
    assert done.returncode == 0 and "2.9 KiB deleted" in done.stdout
    assert sorted(path.name for path in triton.iterdir()) == ["photos", "thesis.txt"]


def test_nothing_is_deleted_without_a_yes(places):
    home, _, env = places
    (home / "timings.json").write_text("{}", "utf-8")
    done = run(env, "clear", "--timings")
    assert done.returncode == 1 and "--yes" in done.stderr and "Nothing was deleted" in done.stdout
    assert (home / "timings.json").exists()
    assert run(env, "clear", "--timings", "--yes").returncode == 0
    assert not (home / "timings.json").exists()
    assert "Nothing to delete" in run(env, "clear", "--timings").stdout


def test_clearing_verdicts_keeps_what_the_user_asked_for(places):
    home, _, env = places

    def fill(state):
        state.verdicts["flash_attn"] = {"abc": Verdict("raises", "RuntimeError: schema")}
        state.added.append("xformers")
        state.lifted.append("def")

    store(home).update(fill)
    assert run(env, "clear", "--verdicts", "--yes").returncode == 0
    left = store(home).read()
    assert (left.verdicts, left.added, left.lifted) == ({}, ["xformers"], ["def"])


def link(at: Path, to: Path) -> None:
    try:
        at.symlink_to(to, target_is_directory=True)
    except OSError as error:
        pytest.skip(f"this system lets nobody make links: {error}")


def test_nothing_is_deleted_through_a_link(tmp_path):
    real = tmp_path / "elsewhere"
    (real / ENTRY).mkdir(parents=True)
    (real / ENTRY / "precious").write_text("x", "utf-8")
    link(tmp_path / "cache", real)
    with pytest.raises(LeftAloneError, match="nothing is deleted through it"):
        Cache("triton", tmp_path / "cache", "").clear()
    holder = tmp_path / "holder"
    (holder / ENTRY).mkdir(parents=True)
    link(holder / ENTRY / "inside", real)
    link(holder / ENTRY.replace("A", "B"), real / ENTRY)
    Cache("triton", holder, "").clear()
    assert (real / ENTRY / "precious").exists()
    assert [path.name for path in holder.iterdir()] == [ENTRY.replace("A", "B")]
