"""Rules on real ComfyUI models, in this process: what a node leaves behind, and what a run of the model does."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from comfyui_attune.attention.policy import Policy, Rule


@pytest.fixture(scope="module")
def host(comfy):
    """The pack's host module, importable once ComfyUI is."""
    from comfyui_attune.host import comfyui

    return comfyui


@pytest.fixture(scope="module")
def wan(host, models):
    """The tiny Wan 2.2 text-to-video model of the high-noise stage."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(
        str(models / "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors")
    )


def sample(model, steps=4, first=None, last=None, scheduler="simple", denoise=1.0, sampler="euler"):
    """A latent video of the tiny model, always from the same noise."""
    import comfy.sample

    generator = torch.Generator().manual_seed(0)
    latent = torch.zeros(1, 16, 2, 8, 8)
    noise = torch.randn(latent.shape, generator=generator)
    text = [[torch.randn(1, 6, 768, generator=generator), {}]]
    return comfy.sample.sample(
        model, noise, steps, 2.0, sampler, scheduler, text, text, latent,
        denoise=denoise, start_step=first, last_step=last, seed=1, disable_pbar=True,
    )  # fmt: skip


def host_runs():
    from comfyui_attune.host.runs import RUNS

    return RUNS.as_list()


def last_run(host):
    return host_runs()[-1]


def test_a_node_clones_and_leaves_the_model_as_it_was(host, wan):
    options, wrappers = copy.deepcopy(wan.model_options), copy.deepcopy(wan.wrappers)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    clean = sample(wan)
    patched = host.attach(wan, Rule(("basic",), source="3"))
    assert patched is not wan
    sample(patched)
    assert last_run(host)["observed"] == {
        "basic": 4 * 2 * 2
    }  # steps, blocks, self and cross; cond and uncond go as one batch
    assert wan.model_options == options and wan.wrappers == wrappers
    assert torch.nn.functional.scaled_dot_product_attention is sdpa
    assert torch.equal(sample(wan), clean)


def test_nothing_of_the_trampoline_is_left_after_a_run(host, wan):
    import comfy.ldm.modules.attention as module

    from comfyui_attune.host.trampoline import wrapped_cells

    before = {name: cell.cell_contents for name, cell in wrapped_cells(module).items()}
    seen = {}

    def look(*_args, **_kwargs):
        seen.update({name: cell.cell_contents for name, cell in wrapped_cells(module).items()})

    patched = host.attach(wan, Rule(("host",), source="3"))
    patched.set_model_sampler_post_cfg_function(lambda args: look() or args["denoised"])
    sample(patched, steps=1)
    assert {name: cell.cell_contents for name, cell in wrapped_cells(module).items()} == before
    assert all(seen[name] is not func for name, func in before.items())


def test_host_gives_the_very_bits_of_a_run_without_the_pack(host, wan):
    assert torch.equal(sample(host.attach(wan, Rule(("host",), source="3"))), sample(wan))


def test_exact_kernels_give_the_same_video(host, wan):
    clean = sample(wan)
    for name in ("sdpa", "sdpa_flash", "sdpa_math", "split", "sub_quad", "basic"):
        out = sample(host.attach(wan, Rule((name,), source="3")))
        assert set(last_run(host)["observed"]) == {name}
        assert torch.allclose(out, clean, atol=1e-4), name


def test_nodes_chain_and_the_record_knows_each(host, wan):
    model = host.attach(wan, Rule(("sub_quad",), source="3"), node_type="AttentionSelector")
    model = host.attach(model, Rule(("sage3",), source="4"), node_type="Sage3Switch")
    sample(model, steps=1)
    nodes = last_run(host)["nodes"]
    assert nodes["3"]["observed"] == nodes["4"]["observed"] == {"sub_quad": nodes["3"]["calls"]}
    assert nodes["3"]["refused"] == [] and nodes["4"]["refused"][0]["kernel"] == "sage3"
    assert (nodes["3"]["node_type"], nodes["4"]["node_type"]) == ("AttentionSelector", "Sage3Switch")


@pytest.mark.parametrize("stage", [(None, None), (0, 5), (5, 10)])
@pytest.mark.parametrize("scheduler", ["simple", "beta", "normal"])
def test_percent_is_the_hosts_percent_on_every_stage(host, wan, stage, scheduler):
    model = host.attach(
        wan, Rule(("basic",), source="1"), Rule(("sub_quad",), from_percent=35, to_percent=80, source="2")
    )
    sigmas_seen = []
    model.set_model_unet_function_wrapper(
        lambda apply, args: (
            sigmas_seen.append(float(args["timestep"].max())),
            apply(args["input"], args["timestep"], **args["c"]),
        )[1]
    )
    sample(model, steps=10, first=stage[0], last=stage[1], scheduler=scheduler)
    sampling = model.get_model_object("model_sampling")
    high, low = sampling.percent_to_sigma(0.35), sampling.percent_to_sigma(0.80)
    inside = sum(low <= sigma <= high for sigma in sigmas_seen)
    observed = last_run(host)["observed"]
    per_forward = sum(observed.values()) / len(sigmas_seen)
    assert observed.get("sub_quad", 0) == inside * per_forward
    assert observed.get("basic", 0) == (len(sigmas_seen) - inside) * per_forward


def test_model_sampling_that_comes_after_the_node_counts(host, wan):
    """ModelSamplingSD3 changes what a percent means, and usually comes after our node."""
    import comfy.model_sampling

    class Shifted(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    counts = []
    for shift in (1.0, 12.0):
        model = host.attach(wan, Rule(("sub_quad",), to_percent=50, source="2"))
        shifted = Shifted(model.model.model_config)
        shifted.set_parameters(shift=shift, multiplier=1000)
        model.add_object_patch("model_sampling", shifted)
        seen = []

        def look(apply, args, seen=seen):
            seen.append(float(args["timestep"].max()))
            return apply(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(look)
        sample(model, steps=10)
        inside = sum(sigma >= shifted.percent_to_sigma(0.5) for sigma in seen)
        assert 0 < inside < len(seen) == 10
        assert last_run(host)["observed"] == {"sub_quad": inside * 4, "host": (10 - inside) * 4}
        counts.append(shifted.percent_to_sigma(0.5))
    assert counts[0] != counts[1]  # the limit really is another one


def test_bare_calls_are_routed_inside_a_run_and_only_there(host):
    """PixArt's real call site passes no transformer_options."""
    import comfy.ldm.modules.attention as module
    import comfy.ops
    from comfy.ldm.pixart.blocks import MultiHeadCrossAttention

    from comfyui_attune.attention.router import Router
    from comfyui_attune.attention.session import Forward, Session
    from comfyui_attune.host import trampoline

    layer = MultiHeadCrossAttention(64, 2, operations=comfy.ops.manual_cast)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1).requires_grad_(False)
    x, text = torch.randn(1, 12, 64), torch.randn(1, 5, 64)
    router = Router(Policy((Rule(("basic",), source="1"),)), host.kernels(), host.machine(), host.LINK)
    session = Session(router)
    expected = layer(x, text, None)
    with trampoline.installed(module):
        layer(x, text, None)
        assert not session.record.observed()
        with Forward(router, session, frozenset({0})):
            out = layer(x, text, None)
            other = threading.Thread(target=layer, args=(x, text, None))
            other.start()
            other.join()
    assert session.record.observed() == {"basic": 1}
    assert torch.allclose(out, expected, atol=1e-5)


def test_an_override_that_came_before_keeps_its_meaning(host, wan):
    calls = []

    def earlier(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    model = wan.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = earlier
    out = sample(host.attach(model, Rule(("sub_quad",), source="1")), steps=1)
    assert last_run(host)["observed"] == {"sub_quad": len(calls)}
    assert torch.allclose(out, sample(wan, steps=1), atol=1e-5)


def test_an_override_that_comes_later_wins_and_is_said(host, wan):
    import comfy.ldm.modules.attention as module

    model = host.attach(wan, Rule(("basic",), source="1")).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: (
        module.attention_pytorch(*args, **kwargs)
    )
    sample(model, steps=1)
    run = last_run(host)
    assert run["observed"] == {}
    assert "a later node replaced the override" in run["notes"][0]


def test_model_patcher_subclasses_work(host, wan):
    import comfy.model_patcher

    class GGUFModelPatcher(type(wan)):
        pass

    model = wan.clone()
    model.__class__ = GGUFModelPatcher
    patched = host.attach(model, Rule(("sub_quad",), source="1"))
    assert type(patched) is GGUFModelPatcher and isinstance(patched, comfy.model_patcher.ModelPatcher)
    sample(patched, steps=1)
    assert set(last_run(host)["observed"]) == {"sub_quad"}


def test_a_model_of_an_unknown_kind_runs_unchanged_and_is_said(host, caplog):
    class WanVideoModel:
        pass

    model = WanVideoModel()
    assert host.attach(model, Rule(("sdpa",), source="1")) is model
    assert "WanVideoModel cannot be patched" in caplog.text and "runs unchanged" in caplog.text


def test_attune_off_makes_the_pack_inert(host, wan, monkeypatch):
    monkeypatch.setenv("ATTUNE", "off")
    assert host.attach(wan, Rule(("sdpa",), source="1")) is wan


def test_an_interrupt_closes_the_record_and_goes_through(host, wan):
    import comfy.model_management

    model = host.attach(wan, Rule(("sub_quad",), source="1"))
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model)
    assert last_run(host)["status"] == "stopped"


def test_an_error_of_the_model_is_not_ours_to_keep(host, wan):
    model = host.attach(wan, Rule(("sub_quad",), source="1"))
    model.set_model_unet_function_wrapper(lambda apply, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model)
    assert last_run(host)["status"] == "failed"


def test_blocks_are_counted_for_every_family_of_models(host):
    import comfy.ops

    def counted(net):
        return host.count_blocks(type("P", (), {"model": type("M", (), {"diffusion_model": net})})())

    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    flux = Flux(
        in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=8, hidden_size=256, mlp_ratio=1.0, num_heads=2,
        depth=2, depth_single_blocks=3, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
        guidance_embed=False, txt_ids_dims=[], dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast,
    )  # fmt: skip
    assert counted(flux) == (2, 5)
    unet = UNetModel(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, channel_mult=(1, 2),
        num_head_channels=8, num_heads=-1, use_spatial_transformer=True, transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, context_dim=16, dtype=torch.float32,
        device="cpu", operations=comfy.ops.manual_cast,
    )  # fmt: skip
    assert counted(unet) == (0, 7)
    assert counted(torch.nn.Linear(2, 2)) == (0, None)


def test_the_state_of_the_host_is_read_without_a_guess(host):
    from comfyui_attune.host import process

    assert host.machine().host_attention in ("sub_quad", "pytorch", "split")
    assert process.host_flag() == ""
    process.launch.use_split_cross_attention = True
    try:
        assert process.host_flag() == "--use-split-cross-attention"
    finally:
        process.launch.use_split_cross_attention = False
    assert [device.name for device in host.machine().devices] == ["cpu"]  # the tests' host was started with --cpu


def test_two_runs_of_one_patched_model_at_once_are_never_mixed_up(host, wan):
    """The inner run begins and ends while the outer one is under way; the host itself never does that in one thread."""
    from types import SimpleNamespace

    attachment = host.attached(host.attach(wan, Rule(("sub_quad",), source="1")))

    def run(forwards, between=lambda: None):
        guider = SimpleNamespace(model_options={}, model_patcher=None)

        def sampling(*_args):
            for _ in range(forwards):
                options = dict(guider.model_options["transformer_options"])

                def model(_x, _t, _concat, _cross, _control, given):
                    assert "attune_session" not in given
                    between()

                attachment.apply_model(model, None, torch.ones(1), None, None, None, options)

        sampling.class_obj = guider
        attachment.outer_sample(sampling)

    run(2, between=lambda: run(1))
    outer, *inner = host_runs()[-3:]
    assert [outer["forwards"], *(run["forwards"] for run in inner)] == [2, 1, 1]
    assert attachment.router.idle_session.record.forwards == 0


def test_a_model_that_does_not_tell_its_progress_runs_all_the_same(host, wan):
    model = host.attach(wan, Rule(("basic",), source="1"), Rule(("sub_quad",), to_percent=50, source="2"))
    sampling = model.get_model_object("model_sampling")

    class Silent(type(sampling)):
        def percent_to_sigma(self, percent):
            raise AttributeError("no percent here")

    silent = copy.copy(sampling)
    silent.__class__ = Silent
    model.add_object_patch("model_sampling", silent)
    sample(model, steps=1)
    run = last_run(host)
    assert run["observed"] == {"basic": 4}
    assert "rules by percent do nothing" in run["notes"][0]
