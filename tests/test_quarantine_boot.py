"""A real ComfyUI with broken attention packages: without the pack it dies, with it it starts, serves and samples."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from broken import make

from attune_devtools.host import Host
from attune_devtools.say import Stop
from support.workflows import latent, read, small

QUARANTINED = re.compile(r"Attune: (\S+ \S+) is in quarantine, to ComfyUI it is not installed: (.*)")


def on_path(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


def state(folder: Path) -> dict:
    """The outcome for each package in the quarantine's file."""
    verdicts = json.loads((folder / "quarantine.json").read_text("utf-8"))["state"]["verdicts"]
    return {name: [verdict["outcome"] for verdict in kept.values()] for name, kept in verdicts.items()}


def sample(server):
    """A small video latent of the tiny Wan 2.2 model, through the pack's own nodes."""
    result = server.run(small(server, read("wan2.2_t2v_14b"), seed=1))
    assert result.runs
    return latent(result)


@pytest.mark.parametrize(
    ("package", "kind", "flag", "end"),
    [
        ("flash_attn", "schema", None, "exit code 1; .*philox_seed"),
        ("sageattention", "exit", None, "exit code 255"),
        ("sageattn3", "os exit", None, "exit code 1"),
        ("xformers", "segfault", None, "exit code -11" if os.name != "nt" else "exit code"),
        ("sageattention", "signature", None, "exit code 1; .*native function"),
        ("flash_attn", "missing module", "--use-flash-attention", "exit code 255"),
        ("sageattention", "loop", None, "did not answer within"),
    ],
)
def test_a_comfyui_without_the_pack_dies_of_it(comfyui_folder, tmp_path, package, kind, flag, end):
    make(tmp_path / "site", package, kind)
    flags = ["--cpu", "--disable-all-custom-nodes", *([flag] if flag else [])]
    (tmp_path / "base").mkdir()
    env = {"PYTHONPATH": on_path(tmp_path / "site")}
    host = Host(Path(sys.executable), comfyui_folder, tmp_path / "base", flags, env=env)
    try:
        with pytest.raises(Stop) as stopped:
            host.start(seconds=15 if kind == "loop" else 120)
    finally:
        host.stop()
    assert re.search(end, str(stopped.value)), str(stopped.value)


def test_with_the_pack_it_starts_on_the_first_boot_and_later_boots_probe_nothing(make_server, tmp_path):
    site, kept = tmp_path / "site", tmp_path / "state"
    for package, kind in (
        ("sageattention", "loop"), ("flash_attn", "schema"), ("xformers", "segfault"), ("sageattn3", "os exit"),
    ):  # fmt: skip
        make(site, package, kind)
    env = {"PYTHONPATH": on_path(site), "ATTUNE_HOME": str(kept)}
    latents = []
    for boot in ("first", "second"):
        server = make_server("--use-sage-attention", env=env, folder=f"{boot}-boot")
        latents.append(sample(server))
        said = server.output()
        server.stop()
        found = dict(QUARANTINED.findall(said))
        assert set(found) == {f"{name} 9.9.1" for name in ("sageattention", "flash_attn", "xformers", "sageattn3")}
        assert "The flag --use-sage-attention was cleared" in found["sageattention 9.9.1"]
        assert "philox_seed" in found["flash_attn 9.9.1"]
        assert said.count("in child processes, because") == (boot == "first")
        assert "PRESTARTUP FAILED" not in said
    assert (latents[0] == latents[1]).all()
    # On a machine so slow that nothing is known about the loop, it is hidden all the same but not stored.
    assert {name: outcome for name, outcome in state(kept).items() if name != "sageattention"} == {
        "flash_attn": ["raises"], "xformers": ["crashed"], "sageattn3": ["crashed"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "kinds", "hidden"),
    [
        (
            "--use-flash-attention",
            {"sageattention": "signature", "flash_attn": "exit", "xformers": "memory", "sageattn3": "dll"},
            {"sageattention", "flash_attn", "xformers", "sageattn3"},
        ),
        (
            "--use-sage-attention",
            {
                "sageattention": "missing module",
                "flash_attn": "chatter",
                "xformers": "search path",
                "sageattn3": "patches torch",
            },
            set(),
        ),
    ],
    ids=["flash flag", "sage flag"],
)
def test_with_the_pack_it_starts_with_launch_flags(make_server, tmp_path, flag, kinds, hidden):
    site, kept = tmp_path / "site", tmp_path / "state"
    for package, kind in kinds.items():
        make(site, package, kind)
    server = make_server(flag, env={"PYTHONPATH": on_path(site), "ATTUNE_HOME": str(kept)}, folder="flags")
    sample(server)
    said = server.output()
    server.stop()
    assert {name.split()[0] for name, _ in QUARANTINED.findall(said)} == hidden
    assert re.search(f"flag {flag} was cleared", said)
    assert {name for name, outcome in state(kept).items() if outcome == ["works"]} == set(kinds) - hidden - {
        "sageattention"
    }
