"""Processors, back ends and modules of every kind, set before attune.apply or after it."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

import comfyui_attune as attune
from comfyui_attune.attention.policy import BlockRange, Policy, Rule
from comfyui_attune.pipelines import calls
from support.pipes import OneModule, forbidden, nothing_remembered, objects_of, state

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

import tiny_pipelines as pipelines
from controlvideo_modules import FullyFrameAttention, IndividualAttention, controlvideo_like

__all__ = ["nothing_remembered", "state"]  # fixtures of every test here
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and torch deprecate things of their own


def test_processors_that_make_score_tensors_are_routed_without_them():
    from diffusers.models.attention_processor import AttnProcessor

    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    pipe.unet.set_attn_processor(AttnProcessor())
    with attune.applied(pipe, "split") as handle, forbidden("baddbmm"):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == {"split": 17}


@pytest.mark.parametrize("kernel", ["split", "host"])
@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
def test_under_autocast_a_kernel_computes_as_it_does_without(kernel, processor):
    """Its own operators are not narrowed: scores in bfloat16 are nothing that anybody asked for."""
    from diffusers.models import attention_processor

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(getattr(attention_processor, processor)())
    with torch.autocast("cpu", torch.bfloat16):
        before = pipelines.result(pipe, call)
        with attune.applied(pipe, kernel) as handle:
            found = pipelines.result(pipe, call)
            data = handle.data()[0]
    assert data["observed"] == {kernel: 17} and not data["events"]
    assert found.dtype is before.dtype and torch.allclose(found.float(), before.float(), atol=0.05)


@pytest.mark.parametrize("others", [torch.float32, torch.bfloat16])
def test_under_autocast_a_compiled_call_takes_and_gives_what_sdpa_does(others):
    """Norms of q and k may give float32 there; SDPA narrows what autocast narrows, and float64 stays."""
    q, k = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8, dtype=others)

    def attend(q, k, v):
        return calls.sdpa(q, k, v)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        found = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, k)
        assert attend(q.double(), q.double(), q.double()).dtype is torch.float64
    assert found.dtype is wanted.dtype is torch.bfloat16 and torch.allclose(found, wanted, atol=0.02)


def test_slices_of_a_batch_are_routed():
    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    pipe.enable_attention_slicing(1)
    with attune.applied(pipe, "split") as handle, forbidden("baddbmm"):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"]["split"] > 17  # each slice is a call


@pytest.mark.parametrize("kernel", ["sdpa", "host"])
def test_what_a_kernel_calls_is_not_routed_again(kernel):
    from diffusers.models.attention_processor import AttnProcessor

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(AttnProcessor())
    with attune.applied(pipe, kernel) as handle:
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {kernel: 17}
    pipe, call = pipelines.sd15()
    controlvideo_like(pipe.unet)
    with attune.applied(pipe, kernel) as handle:
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {kernel: 17}


def test_scores_that_somebody_looks_at_are_computed():
    """Prompt-to-prompt and its kind keep or change the scores between softmax and values."""
    from diffusers.models.attention_processor import AttnProcessor

    seen = []

    class Looking(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (attn.head_to_batch_dim(f(x)) for f, x in
                       ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))  # fmt: skip
            scores = attn.get_attention_scores(q, k, attention_mask)
            seen.append(tuple(scores.shape))
            scores = scores * 0.5 + scores.roll(1, -1) * 0.5
            return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, v)))

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(Looking())
    before = pipelines.result(pipe, call)
    with attune.applied(pipe, "split") as handle:
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-5)
        assert any("Looking" in note for note in handle.notes)
    assert seen[0] == (4, 64, 64)


def test_scores_that_are_changed_in_place_are_the_ones_that_are_used():
    from diffusers.models.attention_processor import AttnProcessor

    class Editing(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (attn.head_to_batch_dim(f(x)) for f, x in
                       ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))  # fmt: skip
            scores = attn.get_attention_scores(q, k, attention_mask)
            scores[: len(scores) // 2] = scores[len(scores) // 2 :]
            scores *= 0.5
            scores.mul_(2.0)
            both = torch.cat([scores, scores])[: len(scores)]
            assert torch.equal(both, scores[:])
            return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, v)))

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(Editing())
    before = pipelines.result(pipe, call)
    with attune.applied(pipe, "split"):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-5)


def test_processors_of_others_are_wrapped_or_left_alone():
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Mine(AttnProcessor2_0):
        pass

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(Mine())
    with attune.applied(pipe, "split") as handle:
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 17}
        assert any("Mine" in note and "routed" in note for note in handle.notes)
        assert all(isinstance(one, Mine) for one in pipe.unet.attn_processors.values())
    with attune.applied(pipe, "split", foreign="leave") as handle:
        pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 1}  # the VAE's
        assert "left alone" in handle.report()


def test_an_ip_adapter_keeps_its_processors():
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe, _ = pipelines.sd15()
    for module in pipe.unet.modules():
        if getattr(module, "is_cross_attention", False) and hasattr(module, "get_attention_scores"):
            module.set_processor(IPAdapterAttnProcessor2_0(module.to_q.in_features, 16, num_tokens=(4,)))
    inputs = (torch.randn(1, 4, 16, 16), 5, (torch.randn(1, 7, 16), [torch.randn(1, 1, 4, 16)]))
    with torch.no_grad():
        before = pipe.unet(*inputs).sample
        with attune.applied(pipe, "split") as handle:
            assert torch.allclose(pipe.unet(*inputs).sample, before, atol=1e-4)
            assert handle.data()[0]["observed"]["split"] == 12  # 4 of self attention, 4 of cross attention twice
            assert any("IP-Adapter" in note for note in handle.notes)
        assert torch.equal(pipe.unet(*inputs).sample, before)


def test_a_pipeline_set_to_xformers_runs_without_it():
    from diffusers.models.attention_processor import XFormersAttnProcessor

    pipe, call = pipelines.sd15()
    before = pipelines.result(pipe, call)
    theirs = XFormersAttnProcessor()
    for module in pipe.unet.modules():
        if hasattr(module, "get_attention_scores"):
            module.processor = theirs
    with attune.applied(pipe, "split") as handle:
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert any("xformers" in note for note in handle.notes)
    assert all(one is theirs for one in pipe.unet.attn_processors.values())


def test_xformers_with_weights_of_its_own_is_left_alone():
    from diffusers.models.attention_processor import XFormersAttnAddedKVProcessor, XFormersAttnProcessor

    from comfyui_attune.pipelines.processors import without_xformers

    class Module:
        processor = XFormersAttnAddedKVProcessor()

    assert type(without_xformers(Module)).__name__ == "AttnAddedKVProcessor2_0"
    Module.processor = type("XFormersOfMine", (torch.nn.Module,), {})()
    assert without_xformers(Module) is None
    Module.processor, Module.scale_qk = XFormersAttnProcessor(), False
    assert without_xformers(Module) is None


def test_a_back_end_of_diffusers_stays_what_the_pipeline_falls_back_to():
    pipe, call = pipelines.wan()
    pipe.transformer.set_attention_backend("_native_math")
    try:
        before = pipelines.result(pipe, call)
        objects = objects_of(pipe)
        with attune.applied(pipe, "host") as handle:
            assert torch.equal(pipelines.result(pipe, call), before)
            assert set(handle.data()[0]["observed"]) == {"host"}
        assert objects_of(pipe) == objects
    finally:
        pipe.transformer.set_attention_backend("native")


def test_our_back_end_can_be_named_while_a_pipeline_is_patched():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    pipe, call = pipelines.flux()
    before, names = pipelines.result(pipe, call), list(AttentionBackendName)
    with attune.applied(pipe, "split") as handle:
        pipe.transformer.set_attention_backend("attune")
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"]["split"] == 7
        assert "attune" in [one.value for one in AttentionBackendName]
    assert list(AttentionBackendName) == names
    assert "attune" not in _AttentionBackendRegistry._backends
    assert _AttentionBackendRegistry._active_backend is AttentionBackendName.NATIVE


def test_a_controlvideo_like_pipeline(monkeypatch):
    pipe, call = pipelines.sd15()
    assert controlvideo_like(pipe.unet) == 8
    before, objects = pipelines.result(pipe, call), objects_of(pipe)
    for module in pipe.unet.modules():
        if isinstance(module, (FullyFrameAttention, IndividualAttention)):
            module._use_memory_efficient_attention_xformers = True  # whose kernel is broken
            module._slice_size = 1
    with attune.applied(pipe, "split") as handle, forbidden("baddbmm"):
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == {"split": 17}
        assert any("xformers" in note and "switched off" in note for note in handle.notes)
        assert any("slices" in note for note in handle.notes)
    for module in pipe.unet.modules():
        if isinstance(module, (FullyFrameAttention, IndividualAttention)):
            assert module._use_memory_efficient_attention_xformers is True and module._slice_size == 1
            module._use_memory_efficient_attention_xformers, module._slice_size = False, None
    assert torch.equal(pipelines.result(pipe, call), before)
    assert objects_of(pipe).keys() == objects.keys()


def test_xformers_stays_on_where_it_works(monkeypatch):
    from types import SimpleNamespace

    from comfyui_attune.pipelines import hooks

    known = {"xformers_cutlass": SimpleNamespace(works=True)}
    monkeypatch.setattr(hooks, "verdicts", lambda: SimpleNamespace(known=lambda device: known))
    pipe, call = pipelines.sd15()
    controlvideo_like(pipe.unet)
    before = pipelines.result(pipe, call)
    module = next(one for one in pipe.unet.modules() if isinstance(one, FullyFrameAttention))
    module._use_memory_efficient_attention_xformers = True
    with attune.applied(pipe, "split") as handle:
        assert module._use_memory_efficient_attention_xformers is True
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == {"split": 17}  # its call, too: xformers' own broken one is never made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("mask", [None, (6, 5, 9), (6, 1, 9), (1, 5, 9), (1, 1, 9)])
@pytest.mark.parametrize("kernel", ["split", "sdpa", "host"])
def test_own_attention_with_masks_and_types(dtype, upcast, mask, kernel):
    torch.manual_seed(0)
    module = FullyFrameAttention(24, upcast_attention=upcast)
    q, k, v = (torch.randn(6, length, 12).to(dtype) for length in (5, 9, 9))
    q = torch.randn(6, 12, 5).to(dtype).transpose(1, 2)  # not contiguous
    bias = None if mask is None else torch.randn(*mask).to(dtype)
    with torch.no_grad():
        wanted = module._attention(q.float(), k.float(), v.float(), None if bias is None else bias.float())
        pipe = OneModule(module)
        with attune.applied(pipe, kernel) as handle:
            out = pipe(q, k, v, bias)
            assert set(handle.data()[0]["observed"]) == {kernel}
            assert ("upcast_attention" in handle.report()) is (
                kernel == "host" and upcast and dtype is not torch.float32
            )
    assert out.dtype is dtype and out.shape == (3, 5, 24)
    error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (out.float() - wanted).norm() / wanted.norm() < error


# Set after `apply`: hooked before the next forward, and still there after `remove`


def test_xformers_switched_on_after_apply():
    """By hand: enable_xformers_memory_efficient_attention() wants a GPU."""
    from diffusers.models.attention_processor import XFormersAttnProcessor

    pipe, call = pipelines.sd15()
    before, theirs = pipelines.result(pipe, call), XFormersAttnProcessor()
    with attune.applied(pipe, "split") as handle:
        pipelines.result(pipe, call)
        pipe.unet.set_attn_processor(theirs)
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[1]["observed"] == {"split": 17}
        assert any("was set to xformers" in note for note in handle.data()[1]["notes"])
    assert all(one is theirs for one in pipe.unet.attn_processors.values())


def test_processors_set_in_the_middle_of_a_run():
    """As pipelines with perturbed attention do it, and callbacks."""
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    pipe, call = pipelines.sd15()
    theirs = [XFormersAttnProcessor(), AttnProcessor2_0()]

    def change(pipe, step, *_):
        pipe.unet.set_attn_processor(theirs[step])
        return {}

    with attune.applied(pipe, "split") as handle:
        pipelines.result(pipe, {**call, "callback_on_step_end": change})
        assert handle.data()[0]["observed"] == {"split": 17}
        assert "was set to xformers" in handle.report()
        assert type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor) == AttnProcessor2_0  # noqa: E721
    assert all(one is theirs[1] and type(one) is AttnProcessor2_0 for one in pipe.unet.attn_processors.values())


def counted_backend(monkeypatch, name):
    """Counts the calls of one of diffusers' back ends; its member."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    member, calls = AttentionBackendName(name), []
    its_own = _AttentionBackendRegistry._backends[member]

    def counting(*args, **kwargs):
        calls.append(1)
        return its_own(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, member, counting)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    return member, calls


def test_a_back_end_set_after_apply_is_what_is_fallen_back_to_from_then_on(monkeypatch):
    member, calls = counted_backend(monkeypatch, "_native_math")
    pipe, call = pipelines.flux()
    before = pipelines.result(pipe, call)
    with attune.applied(pipe, Policy((Rule(("split",)), Rule(("host",), blocks=BlockRange(1, 2))))) as handle:
        pipelines.result(pipe, call)
        assert not calls
        pipe.transformer.set_attention_backend("_native_math")
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == handle.data()[1]["observed"] == {"split": 2, "host": 5}
        assert len(calls) == 4  # the fifth is the VAE's, which asks for no back end
    assert {one._attention_backend for one in pipe.transformer.attn_processors.values()} == {member}
    pipelines.result(pipe, call)
    assert len(calls) == 4 + 6


def test_a_processor_shared_by_modules_falls_back_to_its_own_back_end_in_all_of_them(monkeypatch):
    member, calls = counted_backend(monkeypatch, "_native_math")
    pipe, call = pipelines.flux()
    shared = pipe.transformer.transformer_blocks[0].attn.processor
    shared._attention_backend = member
    pipe.transformer.set_attn_processor(shared)
    with attune.applied(pipe, "host"):
        pipelines.result(pipe, call)
    assert len(calls) == 6
    assert shared._attention_backend is member


@pytest.mark.parametrize("make, name", [(pipelines.sd15, "unet"), (pipelines.flux, "transformer")])
def test_projections_fused_after_apply(make, name):
    pipe, call = make()
    before = pipelines.result(pipe, call)
    plain = {type(one) for one in getattr(pipe, name).attn_processors.values()}
    with attune.applied(pipe, "split") as handle:
        pipelines.result(pipe, call)
        pipe_or_model = pipe if make is pipelines.sd15 else pipe.transformer
        pipe_or_model.fuse_qkv_projections()
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == handle.data()[1]["observed"]
        assert set(handle.data()[1]["observed"]) == {"split"}
    pipe_or_model.unfuse_qkv_projections()
    kinds = {type(one) for one in getattr(pipe, name).attn_processors.values()}
    assert kinds == plain and all(kind in plain and "attune" not in str(vars(kind)) for kind in kinds)
    assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-6)


def test_slicing_and_xformers_of_modules_with_their_own_attention_after_apply():
    pipe, call = pipelines.sd15()
    controlvideo_like(pipe.unet)
    before = pipelines.result(pipe, call)
    theirs = [one for one in pipe.unet.modules() if isinstance(one, (FullyFrameAttention, IndividualAttention))]
    with attune.applied(pipe, "split") as handle:
        pipelines.result(pipe, call)
        for module in theirs:
            module._slice_size = 1  # module._sliced_attention raises
            module._use_memory_efficient_attention_xformers = True
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[1]["observed"] == {"split": 17}
        assert "slices attention by itself: switched off" in handle.report()
    assert all(one._slice_size == 1 and one._use_memory_efficient_attention_xformers for one in theirs)


def test_an_attention_module_put_into_a_patched_model():
    """As ControlVideo's authors do it, and IP-Adapter Plus with its resampler."""
    pipe, call = pipelines.sd15()
    with attune.applied(pipe, "split") as handle:
        controlvideo_like(pipe.unet)
        with forbidden("baddbmm"):
            routed = pipelines.result(pipe, call)
        assert handle.data()[0]["observed"] == {"split": 17}
    assert torch.allclose(pipelines.result(pipe, call), routed, atol=1e-4)


def test_processors_of_others_set_after_apply_are_left_alone_on_request():
    from diffusers.models.attention_processor import AttnProcessor

    class Mine(AttnProcessor):
        pass

    pipe, call = pipelines.sd15()
    with attune.applied(pipe, "split", foreign="leave") as handle:
        pipelines.result(pipe, call)
        pipe.unet.set_attn_processor(Mine())
        pipelines.result(pipe, call)
        assert [run["observed"] for run in handle.data()] == [{"split": 17}, {"split": 1}]  # the VAE's
        assert "Mine" in handle.report() and "left alone" in handle.report()


def test_the_foreign_of_the_last_apply_is_in_force():
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Mine(AttnProcessor2_0):
        pass

    pipe, call = pipelines.sd15()
    pipe.unet.set_attn_processor(Mine())
    objects = objects_of(pipe)
    with attune.applied(pipe, "split") as outer:
        with attune.applied(pipe, "split", foreign="leave"):
            pipelines.result(pipe, call)
        pipelines.result(pipe, call)
        assert [run["observed"] for run in outer.data()] == [{"split": 1}, {"split": 17}]
    assert objects_of(pipe) == objects


def ip_adapter(unet):
    """The weights of one for this UNet, as a file of them holds them; seeded."""
    seed = pipelines.generator()
    weights, number = {}, 1
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            for one in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{one}.weight"] = torch.randn(width, 16, generator=seed)
            number += 2
    image = {"proj.weight": torch.randn(64, 16, generator=seed), "proj.bias": torch.zeros(64)}
    return {"image_proj": {**image, "norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}, "ip_adapter": weights}


def test_an_ip_adapter_loaded_into_a_patched_pipeline_leaves_nothing_of_ours(monkeypatch):
    pipe, _ = pipelines.sd15()
    inputs = (torch.randn(1, 4, 16, 16), 5, torch.randn(1, 7, 16))
    conditions = {"image_embeds": [torch.randn(1, 1, 16)]}
    with torch.no_grad(), attune.applied(pipe, "split") as handle:
        pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)], low_cpu_mem_usage=False)
        routed = pipe.unet(*inputs, added_cond_kwargs=conditions).sample
        assert handle.data()[0]["observed"] == {"split": 12}  # of 8 calls, 4 are made twice
    assert {type(one).__name__ for one in pipe.unet.attn_processors.values()} == {
        "AttnProcessor2_0",
        "IPAdapterAttnProcessor2_0",
    }
    for one in pipe.unet.attn_processors.values():
        assert "comfyui_attune" not in str(type(one).__call__.__globals__["F"].__dict__["scaled_dot_product_attention"])
        assert type(type(one)) is type and not [name for name in vars(one) if "copy" in name]
    with torch.no_grad():
        assert torch.allclose(pipe.unet(*inputs, added_cond_kwargs=conditions).sample, routed, atol=1e-4)
        with attune.applied(pipe, "split"):
            pipe.unload_ip_adapter()
    assert {type(type(one)) for one in pipe.unet.attn_processors.values()} == {type}


# The pipeline's own back end, where it is not plain PyTorch


def own_backend(monkeypatch, pipe, name, spoil):
    """Gives the pipeline a back end of that name, of which only `spoil(out, number of the call)` is not PyTorch's."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    member, native = AttentionBackendName(name), _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    known, calls = _AttentionBackendRegistry._supported_arg_names, []

    def attend(**arguments):
        calls.append(1)
        return spoil(native(**arguments), len(calls))

    monkeypatch.setitem(_AttentionBackendRegistry._backends, member, attend)
    monkeypatch.setitem(known, member, known[AttentionBackendName.NATIVE])
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = member
    return calls


def test_the_pipelines_own_lossy_back_end_is_watched_and_healed(monkeypatch):
    pipe, call = pipelines.flux()
    plain = pipelines.result(pipe, call)
    calls = own_backend(monkeypatch, pipe, "sage", lambda out, number: out * math.nan if number > 4 else out)
    with attune.applied(pipe, "host") as handle:
        assert torch.allclose(pipelines.result(pipe, call), plain, atol=1e-4)
        data = handle.data()[0]
        assert len(calls) > 4 and data["repeated"] == 1
        assert data["machine"]["host_attention"] == "sage"
        assert "host gave NaN or infinity" in handle.report()


def test_a_call_for_exact_attention_does_not_go_to_the_pipelines_lossy_back_end(monkeypatch):
    pipe, call = pipelines.flux()
    calls = own_backend(monkeypatch, pipe, "sage", lambda out, number: out)
    rules = Policy((Rule(("host",)), Rule(("sdpa",), exact_only=True)))
    with attune.applied(pipe, rules) as handle:
        pipelines.result(pipe, call)
        assert not calls
        # The VAE's call is by SDPA: that it is not the transformer's back end does not make it another kernel.
        assert handle.data()[0]["observed"] == {"sdpa": 7}


def test_the_pipelines_own_back_end_is_not_called_where_the_doctor_found_it_broken(monkeypatch):
    from types import SimpleNamespace

    from comfyui_attune.pipelines import process

    verdict = SimpleNamespace(works=False, reasons=(), outcome="crashed", detail="invalid argument")
    verdicts = SimpleNamespace(
        known=lambda device: {"xformers": verdict},
        refused=lambda device: {"xformers": "the doctor found: crashed (invalid argument); see `attune doctor`"},
        wait=lambda *_: None,
    )
    monkeypatch.setattr(process, "verdicts", lambda: verdicts)
    pipe, call = pipelines.flux()
    plain = pipelines.result(pipe, call)
    calls = own_backend(monkeypatch, pipe, "xformers", lambda out, number: out * math.nan)
    with attune.applied(pipe, "host") as handle:
        assert torch.allclose(pipelines.result(pipe, call), plain, atol=1e-4)
        assert not calls and handle.data()[0]["observed"] == {"sdpa": 7}
        assert "the pipeline's own attention is xformers here, and the doctor found: crashed" in handle.report()


@pytest.mark.parametrize(
    "backend, package",
    [
        ("native", ""), ("_native_flash", ""), ("flex", ""), ("attune", ""), ("sage", "sage"), ("sage_hub", "sage"),
        ("_sage_qk_int8_pv_fp8_cuda", "sage"), ("flash", "flash"), ("_flash_3_hub", "flash"),
        ("aiter_fa2_hub", "flash"), ("xformers", "xformers"), ("of_tomorrow", "of_tomorrow"),
    ],
)  # fmt: skip
def test_whose_kernels_a_back_end_calls(backend, package):
    from comfyui_attune.pipelines.models import package_of

    assert package_of(backend) == package


class _Fixed:
    """A processor of a user's without a dictionary: nothing can be hung on it."""

    __slots__ = ("_attention_backend", "_parallel_config")

    def __init__(self):
        self._attention_backend = self._parallel_config = None

    def __call__(self, *args, **kwargs):
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        return FluxAttnProcessor.__call__(self, *args, **kwargs)


class _HalfFixed(_Fixed):
    """With a dictionary, in which the name of its back end does not stand."""


@pytest.mark.parametrize("kind", [_Fixed, _HalfFixed])
def test_a_processor_that_nothing_can_be_hung_on_is_routed(kind):
    pipe, call = pipelines.flux()
    before = pipelines.result(pipe, call)
    processor = kind()
    pipe.transformer.set_attn_processor(processor)
    with attune.applied(pipe, "split") as handle:
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[0]["observed"] == {"split": 7}
        assert not any("stays that" in note for note in handle.notes)
        pipe.transformer.set_attention_backend("_native_math")
        assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
        assert handle.data()[1]["observed"] == {"split": 7}
    assert processor._attention_backend == "_native_math"
    for one in pipe.transformer.attn_processors.values():
        one._attention_backend = "sage"
    with attune.applied(pipe, "split") as handle:
        found = next(note for note in handle.notes if "stays that" in note)
    assert f"names sage in {kind.__name__}" in found and "Give it the back end native" in found


def test_compiled_processors_that_make_score_tensors_are_routed_without_them():
    """With a full graph, in which no product of queries and keys is left."""
    from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

    for processor in (AttnProcessor(), SlicedAttnProcessor(1)):
        torch.compiler.reset()
        graphs = []

        def keep(graph, _inputs, graphs=graphs):
            graphs.append(graph.code)
            return graph

        pipe, call = pipelines.sd15()
        pipe.unet.set_attn_processor(processor)
        before = pipelines.result(pipe, call)
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].compile(backend=keep, fullgraph=True)
        with attune.applied(pipe, "split") as handle:
            assert torch.allclose(pipelines.result(pipe, call), before, atol=1e-4)
            assert set(handle.data()[0]["observed"]) == {"split"}
        assert len(graphs) == 1 and "baddbmm" not in graphs[0] and "softmax" not in graphs[0]
        assert torch.equal(pipelines.result(pipe, call), before)
        assert "baddbmm" in graphs[-1]
        assert type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor) is type(processor)
    torch.compiler.reset()
