"""Broken kernels in a real ComfyUI: the video is the host's own, and the record says what happened."""

from __future__ import annotations

import pytest
import torch

from support import prompts
from support.standins import environment

FORWARDS, CALLS = 4, 4  # two stages of two steps; two blocks with self and cross attention each, cond and uncond joined


@pytest.fixture(scope="module")
def broken(make_server, tmp_path_factory):
    """broken(fault): a server in which sage2_fp8_cuda is a stand-in that the doctor finds good, and has that fault."""
    home = tmp_path_factory.mktemp("proved")
    servers = []

    def start(fault: str):
        for server in servers:
            server.stop()
        (home / "failures.json").unlink(missing_ok=True)
        servers.append(make_server(env=environment(home, "sage2", fault=fault), folder="broken"))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def ask(server, kernel="sage2_fp8_cuda", **more):
    patch = lambda prompt, model, stage: prompts.selector(prompt, model, f"20{stage}", kernel, **more)  # noqa: E731
    return server.run(prompts.two_stage(patch, size=32))


def test_nan_from_a_call_on(broken):
    server = broken("sage2_fp8_cuda:nan:from=6")
    clean = prompts.latent(ask(server, "host"))
    result = ask(server)
    for run in result.runs:
        print(run)
    assert torch.isfinite(prompts.latent(result)).all()
    print((prompts.latent(result) - clean).abs().max())
    assert torch.allclose(prompts.latent(result), clean, atol=1e-2)
    print(server.output()[-3000:])
    assert 0
