"""Two processes that share each call of a model (Ulysses, over gloo on the CPU) get what one process gets."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

from support.loading import ROOT

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)
import diffusers

if not hasattr(diffusers, "ContextParallelConfig"):
    pytest.skip("this diffusers has no context parallelism", allow_module_level=True)

SCRIPT = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "docs" / "examples")!r}]
from support.loading import ROOT, load_package
attune = load_package("comfyui_attune", ROOT)
import torch, torch.distributed
import tiny_pipelines
from diffusers import ContextParallelConfig

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, of which there is none
seed = tiny_pipelines.generator()
inputs = {{
    "hidden_states": torch.randn(1, 64, 4, generator=seed), "timestep": torch.ones(1),
    "encoder_hidden_states": torch.randn(1, 6, 32, generator=seed),
    "pooled_projections": torch.randn(1, 16, generator=seed),
    "img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(6, 3),
}}
found = []
for config in ({{"ulysses_degree": 2}}, {{"ring_degree": 2}}):
    pipe, _ = tiny_pipelines.flux()
    with torch.no_grad():
        alone = pipe.transformer(**inputs, return_dict=False)[0]
        handle = attune.apply(pipe, "split")
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(**config))
        try:
            shared = pipe.transformer(**inputs, return_dict=False)[0]
            said = float((alone - shared).abs().max())
        except Exception as error:
            said = str(error)
        run = handle.data()
        found.append([said, run[0]["observed"] if run else {{}}])
    handle.remove()
print(json.dumps(found), flush=True)
torch.distributed.barrier()  # the other may still be setting up
os._exit(0)  # what a ring that failed has begun would be waited for
"""


def in_two_processes(tmp_path):
    """What each of them found: [largest difference from one process or the error, what ran] of Ulysses, a ring."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "share.py"
    script.write_text(textwrap.dedent(SCRIPT), "utf-8")
    processes = []
    for rank in range(2):
        env = {**os.environ, "ATTUNE_HOME": str(tmp_path), "RANK": str(rank), "WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        command = [sys.executable, "-W", "ignore", str(script)]
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
            )
        )
    found = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert out, error
        found.append(json.loads(out.splitlines()[-1]))
    return found


def test_ulysses_shares_our_kernel_and_a_ring_is_left_to_diffusers(tmp_path):
    for ulysses, ring in in_two_processes(tmp_path):
        difference, observed = ulysses
        assert difference < 1e-5
        assert observed == {"split": 3}
        # The plain back end of diffusers cannot do a ring either, and says so as it does without the pack.
        said, observed = ring
        assert "return_lse" in said
        assert observed == {}
