"""Verdicts in a real ComfyUI: a named kernel is waited for, and one that is no good is never called."""

from __future__ import annotations

import json
import time

import pytest

from support import prompts
from support.server import PromptFailedError
from support.standins import environment


def proved(server) -> dict[str, str]:
    """Kernel → outcome, once none is open any more."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = {row["name"]: row["verdict"] for row in server.get("/attune/kernels")["kernels"]}
        if "open" not in rows.values():
            return rows
        time.sleep(0.2)
    raise AssertionError(rows)


def ask(server, kernel, **more):
    patch = lambda prompt, model, stage: prompts.selector(prompt, model, f"20{stage}", kernel, **more)  # noqa: E731
    return server.run(prompts.two_stage(patch, size=32))


def test_a_run_waits_for_the_kernel_it_names_once_in_an_environment(make_server, tmp_path):
    home = tmp_path / "state ünd more"
    for boot in (1, 2):
        server = make_server(env={"ATTUNE_HOME": str(home)}, folder=f"boot-{boot}")
        first, second = ask(server, "sdpa_flash"), ask(server, "sdpa_flash", min_tokens=1)
        proved(server)
        server.stop()
        for run in (*first.runs, *second.runs):
            assert set(run["observed"]) == {"sdpa_flash"}
        waited = [
            note for run in first.runs for note in run["notes"] if "waiting for the verdict on sdpa_flash" in note
        ]
        assert len(waited) == (boot == 1)
        assert not any("waiting" in note for run in second.runs for note in run["notes"])
        said = [line for line in server.output().splitlines() if "Attune: tr" in line]
        assert bool(said) is (boot == 1), said
    kept = json.loads((home / "verdicts.json").read_text("utf-8"))["state"]
    assert [verdict["outcome"] for verdict in kept["sdpa_flash"].values()] == ["works"]


NO_GOOD = {
    "sage2_fp8_cuda": ("exit", "crashed"),
    "sage2_fp16_cuda": ("nan", "wrong numbers"),
    "sage2_fp16_triton": ("error=0.5", "wrong numbers"),
    "flash2": ("raise", "unsupported"),
}


def test_a_kernel_that_is_no_good_is_never_called_in_comfyui(make_server, tmp_path):
    """The faults are in every process. In the server `exit` would end it; the others would show in the record."""
    fault = ";".join(f"{name}:anywhere:{kind}:from=1" for name, (kind, _) in NO_GOOD.items())
    server = make_server(env=environment(tmp_path, "sage2", "flash2", fault=fault), folder="no-good")
    clean = ask(server, "host")
    for name, (_, outcome) in NO_GOOD.items():
        result = ask(server, name)
        assert (prompts.latent(clean) == prompts.latent(result)).all()
        for run in result.runs:
            assert set(run["observed"]) == {"host"}
            (node,) = run["nodes"].values()
            assert f"not {name} ×{run['observed']['host']}: the doctor found: {outcome}" in node["text"]
        with pytest.raises(PromptFailedError, match=f"the doctor found: {outcome}"):
            ask(server, name, when_unavailable="error")
    rows = proved(server)
    assert {name: rows[name] for name in NO_GOOD} == {name: outcome for name, (_, outcome) in NO_GOOD.items()}
    assert rows["basic"] == ""  # the host's own
    # One that is right, beside them.
    good = ask(server, "sage2_fp8_cuda_pp")
    server.stop()
    for run in good.runs:
        assert set(run["observed"]) == {"sage2_fp8_cuda_pp"}
