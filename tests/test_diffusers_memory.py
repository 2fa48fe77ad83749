"""R1: a module with its own `_attention` at 18,000 tokens and 16 heads, whose scores would take 19 GiB."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from controlvideo_modules import FullyFrameAttention

import comfyui_attune as attune
from support.loading import ROOT

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # the profiler's, of torch
TOKENS, HEADS, DIM = 18_000, 16, 8


def peak_on_cpu(call) -> int:
    """That of benchmarks/guard.py."""
    spec = importlib.util.spec_from_file_location("attune_guard_benchmark", ROOT / "benchmarks" / "guard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.peak_on_cpu(call)


class Pipeline:
    """A pipeline around one module's `_attention`."""

    def __init__(self, module):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = module

            def forward(self, *args):
                return self.attention._attention(*args)

        self.model = Model()
        self.components = {"model": self.model}

    def __call__(self, *args):
        return self.model(*args)


@pytest.mark.parametrize("kernel", ["sdpa", "split"])
def test_peak_memory_stays_below_a_fifth_above_inputs_and_output(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTUNE_HOME", str(tmp_path))
    module = FullyFrameAttention(HEADS * DIM, heads=HEADS)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(3))
    pipe, outs = Pipeline(module), []
    with attune.applied(pipe, kernel) as handle, torch.no_grad():
        extra = peak_on_cpu(lambda: outs.append(pipe(q, k, v)))
        assert set(handle.data()[0]["observed"]) == {kernel}
    one = q.numel() * q.element_size()
    assert one <= extra, "the profiler has seen no output"
    assert (3 * one + extra) / (4 * one) < 1.2
    rows = torch.randint(TOKENS, (20,), generator=generator)
    reference = ((q[:, rows] @ k.mT * module.scale).softmax(-1) @ v).transpose(0, 1).flatten(1)
    assert torch.allclose(outs[0][0, rows], reference, atol=1e-5)
