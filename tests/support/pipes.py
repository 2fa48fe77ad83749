"""What the tests of attune.apply share: a state folder, what was called, and what a pipeline is made of."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True, scope="module")
def state(tmp_path_factory):
    """A state folder of its own, whatever other tests have used."""
    from comfyui_attune.pipelines import process

    before = os.environ.get("ATTUNE_HOME")
    os.environ["ATTUNE_HOME"] = str(tmp_path_factory.mktemp("home"))
    for cached in (process.verdicts, process.measured, process.link):
        cached.cache_clear()
    yield
    process.verdicts().stop()
    process.verdicts.cache_clear()
    os.environ.pop("ATTUNE_HOME")
    if before is not None:
        os.environ["ATTUNE_HOME"] = before


@pytest.fixture(autouse=True)
def nothing_remembered(state, monkeypatch, tmp_path):
    """What failed in one test counts for nothing in the next."""
    monkeypatch.setenv("ATTUNE_HOME", str(tmp_path))


@contextmanager
def counted_sdpa():
    """Counts the calls of SDPA that reach torch."""
    counts = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is SDPA:
                counts.append(tuple(args[0].shape) if args else ())
            return func(*args, **(kwargs or {}))

    with Counting():
        yield counts


@contextmanager
def forbidden(name):
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            assert getattr(func, "__name__", "") != name, f"{name} was called"
            return func(*args, **(kwargs or {}))

    with Watch():
        yield


def objects_of(pipe):
    """Everything a patched pipeline might have changed: which objects stand where."""
    found = {"class": type(pipe), "ours": [key for key in vars(pipe) if "attune" in key]}
    for name, model in vars(pipe).items():
        if isinstance(model, torch.nn.Module):
            for path, module in model.named_modules():
                for key, value in vars(module).items():
                    if not key.endswith(("feat_map", "conv_idx")):  # a run of Wan's VAE makes these anew
                        found[name, path, key] = id(value)
                for key, value in vars(getattr(module, "processor", None) or object).items():
                    found[name, path, "processor", key] = id(value)
    return found


def broken_kernel(spoil):
    """A kernel for the CPU under the name sage1: split, whose output `spoil(out, number of the call)` may ruin."""
    from comfyui_attune.pipelines.process import kernels

    split = kernels()["split"]
    calls = []

    def run(q, k, v, *, mask=None, scale=None):
        calls.append(q.shape)
        return spoil(split.load()(q, k, v, mask=mask, scale=scale), len(calls))

    return replace(split, name="sage1", needs_proof=True, load=lambda: run), calls


class OneModule:
    """A pipeline around one module, to call it in a forward of ours."""

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
