"""Two processes that share each call of a model (Ulysses and rings, over gloo on the CPU) get what one process gets."""

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
from diffusers.models import attention_dispatch

from comfyui_attune.pipelines import dispatch

if not hasattr(diffusers, "ContextParallelConfig"):
    pytest.skip("this diffusers has no context parallelism", allow_module_level=True)

ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}
CASES = [(ULYSSES, "split"), (RING, None)]
CASES += [(RING, kernel) for kernel in ("split", "sdpa", "sdpa_math", "auto")]
CASES.append((RING, "host", "sage"))
if hasattr(diffusers.ContextParallelConfig, "ring_anything"):
    CASES.append(({**RING, "ring_anything": True}, "split"))

SCRIPT = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "docs" / "examples")!r}]
from support.loading import ROOT, load_package
attune = load_package("comfyui_attune", ROOT)
import torch, torch.distributed
import tiny_pipelines
from diffusers import ContextParallelConfig

from comfyui_attune.kernels.split import run_lse
from diffusers.models import attention_dispatch as table

asked = []

def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
    asked.append(return_lse)
    out, lse = run_lse(*(t.transpose(1, 2) for t in (q, k, v)), scale=sm_scale)
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out

table.sageattn = sageattn  # a back end of diffusers that can do rings, here on the CPU
torch.set_num_threads(1)
torch.distributed.init_process_group("cpu:gloo")  # as `ring_anything` wants it named
torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, of which there is none
seed = tiny_pipelines.generator()
inputs = {{
    "hidden_states": torch.randn(1, 64, 4, generator=seed), "timestep": torch.ones(1),
    "encoder_hidden_states": torch.randn(1, 6, 32, generator=seed),
    "pooled_projections": torch.randn(1, 16, generator=seed),
    "img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(6, 3),
}}
found = []
for config, kernel, *backend in {CASES!r}:
    pipe, _ = tiny_pipelines.flux()
    for module in pipe.transformer.modules() if backend else ():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = table.AttentionBackendName(backend[0])
    with torch.no_grad():
        alone = pipe.transformer(**inputs, return_dict=False)[0]
        if kernel is not None:
            handle = attune.apply(pipe, kernel)
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(**config))
        try:
            shared = pipe.transformer(**inputs, return_dict=False)[0]
            said = float((alone - shared).abs().max())
        except Exception as error:
            said = str(error)
        run = handle.data() if kernel else []
        found.append([said, run[0]["observed"] if run else {{}}, handle.report() if run else ""])
    if kernel is not None:
        handle.remove()
found.append(asked)
print(json.dumps(found), flush=True)
torch.distributed.barrier()  # the other may still be setting up
os._exit(0)  # what a ring that failed has begun would be waited for
"""


def in_two_processes(tmp_path):
    """What each found in each case: [largest difference from one process or the error, what ran, the report];
    at last how diffusers' own back end was asked.
    """
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


def test_each_process_runs_our_kernel_on_its_share(tmp_path):
    for (difference, observed, _report), (said, _, _), *rings, asked in in_two_processes(tmp_path):
        assert difference < 1e-5
        assert observed == {"split": 3}
        assert "return_lse" in said  # diffusers' plain back end cannot do a ring: without the pack it is an error
        wanted = [{"split": 6}, {"sdpa": 6}, {"host": 6}, {"sdpa": 6}, {"host": 6}, {"split": 6}]
        for (difference, observed, report), ran in zip(rings, wanted, strict=False):
            assert isinstance(difference, float) and difference < 1e-5, difference
            assert observed == ran, report
        assert len(rings) >= 5 and asked == [False] * 3 + [True] * 6  # alone, and in the ring
        assert "sdpa_math" in rings[2][2] and "gives no log-sum-exp, by which ring attention joins" in rings[2][2]


def test_the_back_end_leaves_nothing_behind_where_diffusers_keeps_a_dictionary(monkeypatch):
    """As its sources did before 0.36: which back ends can share a call stood in a dictionary by back end."""
    table = attention_dispatch
    kept = type("Kept", (dict,), {"add": lambda self, name: self.update({table.AttentionBackendName(name): True})})()
    monkeypatch.setattr(table._AttentionBackendRegistry, "_supports_context_parallel", kept)
    member = dispatch.register("somebody")
    assert list(kept) == [member]
    dispatch.unregister("somebody")
    assert not kept and dispatch.backend() is None
