"""attune.apply at its edges: unusual processors, back ends and schedulers, callbacks, copies, what fails half-way."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import comfyui_attune as attune
from comfyui_attune.attention.policy import Policy, Rule
from support.loading import ROOT
from support.pipes import counted_sdpa, nothing_remembered, objects_of, state

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

import tiny_pipelines as pipelines
from diffusers import DiffusionPipeline
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

__all__ = ["nothing_remembered", "state"]  # fixtures of every test here
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and torch deprecate things of their own


class Around(DiffusionPipeline):
    """A pipeline that calls one attention module, inside a model."""

    def __init__(self, net):
        super().__init__()
        self.register_modules(net=net)

    def __call__(self, *given):
        with torch.no_grad():
            return self.net(*given)


class Model(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *given):
        return self.attention(*given)


def around(attention):
    return Around(Model(attention))


class ByProcessor(torch.nn.Module):
    def __init__(self, processor):
        super().__init__()
        self.processor = processor

    def forward(self, *given):
        return self.processor(self, *given)


def tokens(count=128):
    return torch.randn(1, count, 2, 16, generator=pipelines.generator())


def observed(handle):
    return [run["observed"] for run in handle.data()]


class Named:
    """A processor that names its back end, as diffusers' own do; its masks are for flex."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, x, mask=None):
        return dispatch_attention_fn(x, x, x, attn_mask=mask, backend=self._attention_backend)


class NamedTwice(Named):
    """A second call names another back end, as Qwen-Image 2.1's do."""

    def __call__(self, attn, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        whole = dispatch_attention_fn(x, x, x, backend=self._attention_backend)
        return whole + dispatch_attention_fn(x, x, x, attn_mask=mask, backend=None)


@pytest.mark.parametrize("how", ["named before", "named after", "active"])
def test_flex_keeps_the_calls_whose_masks_only_it_reads(how):
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention", reason="this torch has no flex attention")
    processor, x = Named(), tokens()
    mask = flex_attention.create_block_mask(lambda b, h, q, k: q >= k, 1, None, 128, 128, device="cpu")
    pipe = around(ByProcessor(processor))
    flex = AttentionBackendName("flex")
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    try:
        if how == "active":
            attention_dispatch._AttentionBackendRegistry._active_backend = flex
        if how == "named before":
            processor._attention_backend = flex
        with attune.applied(pipe, "sdpa") as handle:
            if how == "named after":
                pipe(x)
                processor._attention_backend = flex
            out = pipe(x, mask)
            assert any("flex" in note for note in handle.notes) is (how != "active")
        assert processor._attention_backend is (None if how == "active" else flex)
        assert torch.equal(pipe(x, mask), out)
    finally:
        attention_dispatch._AttentionBackendRegistry._active_backend = active
    q = x.transpose(1, 2)
    wanted = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2)
    assert torch.allclose(out, wanted, atol=1e-5)


def test_a_processor_that_also_names_another_back_end_is_routed_in_all_its_calls():
    processor, x = NamedTwice(), tokens(8)
    pipe = around(ByProcessor(processor))
    before = pipe(x)
    with attune.applied(pipe, "split") as handle:
        with counted_sdpa() as left:
            assert torch.allclose(pipe(x), before, atol=1e-5)
        assert not left and observed(handle) == [{"split": 2}]
    assert torch.equal(pipe(x), before) and processor._attention_backend is None


def result_with(pipe, call, callback):
    """The picture of a call whose `callback(pipe)` is called after the first step."""

    def each(pipe, step, _, kept):
        if step == 0:
            callback(pipe)
        return kept

    return pipe(**call, generator=pipelines.generator(), return_dict=False, callback_on_step_end=each)[0]


def test_another_kernel_applied_in_a_callback_runs_from_then_on():
    pipe, call = pipelines.sd15()
    before, objects = pipelines.result(pipe, call), objects_of(pipe)
    first, second = attune.apply(pipe, "split"), []

    def swap(pipe):
        first.remove()
        second.append(attune.apply(pipe, "sdpa_math"))

    assert torch.allclose(result_with(pipe, call, swap), before, atol=1e-4)
    assert observed(first) == [{"split": 8}] and observed(second[0]) == [{"sdpa_math": 9}]
    second[0].remove()
    assert objects_of(pipe) == objects


def test_removed_in_a_callback_the_run_keeps_its_record():
    pipe, call = pipelines.sd15()
    before, objects = pipelines.result(pipe, call), objects_of(pipe)
    handle = attune.apply(pipe, "split")
    assert torch.allclose(result_with(pipe, call, lambda _: handle.remove()), before, atol=1e-4)
    assert objects_of(pipe) == objects
    assert observed(handle) == [{"split": 8}] and handle.data()[0]["status"] == "finished"
    assert "Ran: split ×8" in handle.report()


def test_an_apply_that_fails_leaves_nothing_behind(monkeypatch):
    from comfyui_attune.pipelines import dispatch, hooks

    pipe, call = pipelines.sd15()
    before, objects = pipelines.result(pipe, call), objects_of(pipe)
    settle = hooks.Hooks._settle
    asked = []

    def interrupted(self, spot):
        asked.append(spot)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return settle(self, spot)

    monkeypatch.setattr(hooks.Hooks, "_settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attune.apply(pipe, "split")
    assert objects_of(pipe) == objects and dispatch.backend() is None
    assert torch.equal(pipelines.result(pipe, call), before)
    with attune.applied(pipe, "split") as handle:
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            attune.apply(pipe, "sdpa_math")
        pipelines.result(pipe, call)
        assert observed(handle) == [{"split": 17}]
    assert objects_of(pipe) == objects


def test_timesteps_that_are_logarithms_tell_no_percent():
    from diffusers import EulerDiscreteScheduler

    pipe, call = pipelines.sd15()
    pipe.scheduler = EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0,
        use_karras_sigmas=True,
    )  # fmt: skip
    rules = Policy((Rule(("split",)), Rule(("sdpa_math",), to_percent=50)))
    with attune.applied(pipe, rules) as handle:
        pipelines.result(pipe, call)
        assert pipe.scheduler.timesteps.min() < 0
        assert set(observed(handle)[0]) == {"split"}
        assert "logarithms of its noise levels): rules by percent do nothing" in handle.report()


def test_a_shallow_copy_of_a_patched_pipeline_can_be_patched_itself():
    pipe, call = pipelines.sd15()
    kind = type(pipe)
    before, objects = pipelines.result(pipe, call), objects_of(pipe)
    handle = attune.apply(pipe, "split")
    twin, later = copy.copy(pipe), copy.copy(pipe)
    with attune.applied(twin, "sdpa_math") as other:
        assert set(other.models) == {"unet", "vae"}
        pipelines.result(twin, call)
        assert observed(other) == [{"sdpa_math": 17}] and not handle.data()
    pipelines.result(pipe, call)
    assert observed(handle) == [{"split": 17}]
    handle.remove()
    with attune.applied(later, "sdpa_math") as other:
        pipelines.result(later, call)
        assert observed(other) == [{"sdpa_math": 17}]
    for one in (pipe, twin, later):
        assert type(one) is kind and objects_of(one) == objects
    assert torch.equal(pipelines.result(later, call), before)


class Helped(torch.nn.Module):
    """Its call of SDPA stands in a helper method, as those of VidTok's VAE do."""

    def _attend(self, x):
        return F.scaled_dot_product_attention(x, x, x)

    def forward(self, x):
        return self._attend(x)


class Inheriting(Helped):
    """Everything comes from its base class."""


@pytest.mark.parametrize("kind", [Helped, Inheriting])
def test_a_module_whose_attention_stands_in_a_helper_is_routed(kind):
    pipe, x = around(kind()), tokens(8)
    before = pipe(x)
    with attune.applied(pipe, "split") as handle, counted_sdpa() as left:
        assert torch.allclose(pipe(x), before, atol=1e-5)
        assert not left and observed(handle) == [{"split": 1}]
    assert torch.equal(pipe(x), before)


OPERATORS = {
    "==": lambda scores: scores * (scores == scores.max().item()),
    "!=": lambda scores: scores * (scores != scores.max().item()),
    "abs": abs,
    "r/": lambda scores: 1 / scores,
    "//": lambda scores: scores // 0.1,
    "r//": lambda scores: 1 // scores,
    "**": lambda scores: scores**2,
    "r**": lambda scores: 2**scores,
    "%": lambda scores: scores % 0.1,
    "r%": lambda scores: 1 % scores,
}


def softmaxed(q, k, mask):
    return (q @ k.transpose(1, 2)).softmax(-1)


@pytest.mark.parametrize("name", OPERATORS)
def test_scores_have_the_operators_of_a_tensor(name):
    from comfyui_attune.pipelines.pending import Pending

    q, k = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    out = OPERATORS[name](Pending(None, q, k, None, softmaxed))
    assert isinstance(out, torch.Tensor) and torch.equal(out, OPERATORS[name](softmaxed(q, k, None)))


def test_scores_are_as_true_as_a_tensor():
    from comfyui_attune.pipelines.pending import Pending

    assert bool(Pending(None, torch.ones(1, 1, 8), torch.ones(1, 1, 8), None, softmaxed))
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(Pending(None, torch.ones(1, 2, 8), torch.ones(1, 2, 8), None, softmaxed))


def test_other_pipelines_are_of_a_patched_ones_class():
    (pipe, _), (other, _), (unlike, _) = pipelines.sd15(), pipelines.sd15(), pipelines.flux()
    kind = type(pipe)
    derived = type("Derived", (kind,), {})
    with attune.applied(pipe, "split"):
        assert isinstance(other, type(pipe)) and isinstance(pipe, type(pipe)) and isinstance(pipe, kind)
        assert issubclass(kind, type(pipe)) and issubclass(derived, type(pipe)) and issubclass(type(pipe), kind)
        assert not isinstance(unlike, type(pipe)) and not issubclass(type(unlike), type(pipe))
        inherited = type("Inherited", (type(pipe),), {})
        assert issubclass(inherited, kind) and not isinstance(other, inherited)


def test_what_a_report_says_in_the_middle_of_a_run_and_at_its_end():
    from diffusers.models.attention_processor import AttnProcessor2_0

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(type("Mine", (AttnProcessor2_0,), {})())
    objects, said = objects_of(pipe), []
    with attune.applied(pipe, "split") as handle:
        result_with(pipe, call, lambda _: said.append(handle.report()))
        said += [handle.report()]
    said.append(handle.report())
    with attune.applied(pipe, "split") as unused:
        pass
    assert objects_of(pipe) == objects
    assert "There is no run to report yet" in said[0] and "let the call end" in said[0]
    assert all("Ran: split ×17" in text for text in said[1:])
    assert [text.count("processors of another kind") for text in [*said, unused.report()]] == [1, 1, 1, 1]


def test_with_apply_as_handle_takes_it_away_when_the_block_fails():
    pipe, _ = pipelines.sd15()
    objects = objects_of(pipe)
    with pytest.raises(ZeroDivisionError), attune.apply(pipe, "split"):
        assert objects_of(pipe) != objects
        raise ZeroDivisionError
    assert objects_of(pipe) == objects


THREAD = f"""
import atexit, sys, threading
sys.path.insert(0, {str(ROOT / "docs" / "examples")!r})
import tiny_pipelines as pipelines

def late():
    threading.main_thread().join()
    pipe, call = pipelines.flux()
    pipelines.result(pipe, call)
    print("thread done", file=sys.stderr, flush=True)

threading.Thread(target=late).start()
atexit.register(lambda: print("registered done", file=sys.stderr, flush=True))
print("script done", file=sys.stderr, flush=True)
"""


def test_the_report_of_a_script_waits_for_its_threads(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(THREAD, "utf-8")
    env = {**os.environ, "ATTUNE_HOME": str(tmp_path / "home"), "PYTHONUTF8": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT), "run", "--kernel", "split", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, check=False)
    assert done.returncode == 0, done.stderr
    told = ["script done", "thread done", "registered done", "Ran: split ×7"]
    places = [done.stderr.find(words) for words in told]
    assert -1 not in places and places == sorted(places), done.stderr
