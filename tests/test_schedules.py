"""Rules by percent and by block against their definition, on every sampler and scheduler and every way to sample.

A rule is in force at a noise level iff that lies between those of its two percents, as ComfyUI compares them (both ends
included). What the model saw is told by ComfyUI's own model function wrapper and by hooks on its blocks, what ran by
kernels that note themselves: nothing that the pack says about itself is asked.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_models import random_state

from comfyui_attune.attention.policy import Rule

# What ComfyUI's samplers and torchsde warn of in these few steps.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:comfy", "ignore::Warning:torchsde")
FLOW = ("wan", "wan, shift 3", "flux", "cosmos")
KINDS = (*FLOW, "eps", "v", "v, zero snr", "edm", "v, continuous", "cascade")
MOST_FORWARDS = 300  # dpm_adaptive takes as many as it likes


class Eye:
    """What the models saw and ran, forward by forward: `seen` holds (sigma, cond_or_uncond, [(block, kernel), …])."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, tuple[int, ...], list[tuple[int, str]]]] = []
        self.block = -1
        self.kept: list = []  # as a server keeps them; the host takes a model whose clones have gone for a leak

    def watch(self, net, blocks) -> None:
        """Number `blocks` in the order in which they run, by hooks."""

        def begin(*_):
            self.block = -1

        def step(*_):
            self.block += 1

        net.register_forward_pre_hook(begin)
        for block in blocks:
            block.register_forward_pre_hook(step)

    def forward(self, apply, args):
        assert len(self.seen) < MOST_FORWARDS
        assert args["timestep"].min() == args["timestep"].max() and args["timestep"].dtype is torch.float32
        self.seen.append((args["timestep"][0].clone(), tuple(args["cond_or_uncond"]), []))
        return apply(args["input"], args["timestep"], **args["c"])

    def noting(self, name, kernel):
        """`kernel` as one that is called `name` and notes here that it ran."""
        run = kernel.load()

        def noted(*args, **kwargs):
            out = run(*args, **kwargs)
            self.seen[-1][2].append((self.block, name))
            return out

        precision = "lossy" if name.startswith("sage") else "exact"
        return dataclasses.replace(kernel, name=name, precision=precision, load=lambda: noted)


@pytest.fixture(scope="module")
def eye():
    return Eye()


@pytest.fixture(scope="module")
def host(comfy, eye):
    """The pack's host module, with three kernels that run on the CPU and note themselves."""
    from comfyui_attune.host import comfyui
    from comfyui_attune.nodes import AttentionRule, Sage3Switch

    sdpa = comfyui.kernels()["sdpa"]
    noting = {name: eye.noting(name, sdpa) for name in ("sdpa", "flash2", "sage3")}
    patch = pytest.MonkeyPatch()
    patch.setattr(comfyui, "kernels", lambda: noting)
    patch.setattr("comfy.utils.PROGRESS_BAR_ENABLED", False)
    for node in (AttentionRule, Sage3Switch):
        patch.setattr(node, "hidden", SimpleNamespace(unique_id="5"))
    yield comfyui
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For tensors as small as these a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(comfy, eye):
    """tiny(kind): a fresh clone of the model of that kind, its latent, and a function that sets its noise schedule."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.sd
    import comfy.supported_models
    from comfy.ldm.wan.model import WanModel
    from comfy.model_base import ModelType, model_sampling

    weights = comfy.ops.disable_weight_init
    wan_net = WanModel(
        model_type="t2v", in_dim=16, out_dim=16, dim=128, ffn_dim=64, num_heads=1, num_layers=6, text_dim=16,
        operations=weights,
    )  # fmt: skip
    wan = comfy.sd.load_diffusion_model_state_dict(
        random_state(wan_net, 1), metadata={"config": '{"transformer": {"text_dim": 16}}'}
    )
    eye.watch(wan.model.diffusion_model, wan.model.diffusion_model.blocks)

    def patcher(config, model, block_lists):
        model = model(config)
        model.diffusion_model.load_state_dict(random_state(model.diffusion_model, 2))
        eye.watch(model.diffusion_model, block_lists(model.diffusion_model))
        return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))

    unet = patcher(
        comfy.supported_models.SD15({
            "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1,
            "channel_mult": (1, 2), "num_head_channels": 8, "num_heads": -1, "use_spatial_transformer": True,
            "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
            "context_dim": 16, "dtype": torch.float32,
        }),
        comfy.model_base.BaseModel,
        lambda net: [module for module in net.modules() if type(module).__name__ == "SpatialTransformer"],
    )  # fmt: skip
    flux = patcher(
        comfy.supported_models.Flux({
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 16,
            "hidden_size": 128, "mlp_ratio": 1.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 3,
            "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
            "txt_ids_dims": [], "dtype": torch.float32,
        }),
        comfy.model_base.Flux,
        lambda net: [*net.double_blocks, *net.single_blocks],
    )  # fmt: skip

    kinds = {
        "cosmos": ModelType.FLOW_COSMOS, "eps": ModelType.EPS, "v": ModelType.V_PREDICTION, "edm": ModelType.EDM,
        "v, continuous": ModelType.V_PREDICTION_CONTINUOUS, "cascade": ModelType.STABLE_CASCADE,
    }  # fmt: skip
    samplings = {name: model_sampling(unet.model.model_config, kind) for name, kind in kinds.items()}
    samplings["wan, shift 3"] = model_sampling(wan.model.model_config, ModelType.FLOW)
    samplings["wan, shift 3"].set_parameters(shift=3.0)
    samplings["v, zero snr"] = type(samplings["v"])(unet.model.model_config, zsnr=True)

    def make(kind):
        model = wan if kind.startswith("wan") else flux if kind == "flux" else unet
        latent = {"wan": (1, 16, 1, 4, 4), "flux": (1, 16, 4, 4)}.get(kind.split(",")[0], (1, 4, 4, 4))

        def schedule(patched):  # ModelSamplingSD3 and its like usually come after our nodes
            if kind in samplings:
                patched.add_object_patch("model_sampling", samplings[kind])
            return patched

        return model.clone(), torch.zeros(latent), schedule

    return make


def text(tokens, **more):
    """A conditioning; `more` as ComfyUI's conditioning nodes set it."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, tokens, 16, generator=generator), {"pooled_output": torch.ones(1, 8), **more}]


@pytest.fixture
def begin(host, tiny, eye):
    """begin(kind, *rules, change=None): a watched model with these rules, and its empty latent."""

    def start(kind, *rules, change=None):
        model, latent, schedule = tiny(kind)
        patched = schedule(change(model) if change else host.attach(model, *rules))
        eye.kept += [model, patched]
        patched.set_model_unet_function_wrapper(eye.forward)
        eye.seen.clear()
        return patched, latent

    return start


def ksampler(model, latent, sampler, scheduler, steps, first=None, last=None, noise=True, leftover=False, **more):
    """What the nodes KSampler and KSamplerAdvanced do."""
    import comfy.sample

    start = comfy.sample.prepare_noise(latent, 1) if noise else torch.zeros_like(latent)
    text_2 = [text(more.pop("negative_tokens", 6))]
    return comfy.sample.sample(
        model, start, steps, more.pop("cfg", 2.0), sampler, scheduler, more.pop("positive", [text(6)]), text_2, latent,
        disable_noise=not noise, start_step=first, last_step=last, force_full_denoise=not leftover, disable_pbar=True,
        seed=1, **more,
    )  # fmt: skip


def two_stages(model, latent, sampler, scheduler, steps, split, **more):
    """KSamplerAdvanced twice: the first leaves its noise in, the second adds none and goes on."""
    half = ksampler(model, latent, sampler, scheduler, steps, 0, split, leftover=True, **more)
    return ksampler(model, half, sampler, scheduler, steps, split, 10_000, noise=False, **more)


def in_force(model, sigma, start, end) -> bool:
    """The definition: comfy.samplers.get_area_and_mult's comparison; percent 0 and 100 have nothing outside them."""
    level = model.get_model_object("model_sampling").percent_to_sigma
    return not (start > 0 and sigma > level(start / 100)) and not (end < 100 and sigma < level(end / 100))


def wrong_forwards(eye, expected) -> list:
    """Forwards in which another kernel ran than `expected(sigma, block)` says, or none."""
    return [
        (float(sigma), ran)
        for sigma, _, ran in eye.seen
        if not ran or any(block < 0 or kernel != expected(sigma, block) for block, kernel in ran)
    ]


def by_percent(model, start, end):
    return lambda sigma, block: "flash2" if in_force(model, sigma, start, end) else "sdpa"


@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_with_every_scheduler_in_two_stages(begin, eye, kind):
    """The number of kinds is no less than that of schedulers: over all kinds each pair with a sampler comes up."""
    from comfy.samplers import KSampler

    assert len(KINDS) >= len(KSampler.SCHEDULERS)
    ran, wrong = set(), []
    for number, sampler in enumerate(KSampler.SAMPLERS):
        scheduler = KSampler.SCHEDULERS[(number + KINDS.index(kind)) % len(KSampler.SCHEDULERS)]
        model, latent = begin(kind, Rule(("sdpa",)), Rule(("flash2",), from_percent=10, to_percent=70))
        two_stages(model, latent, sampler, scheduler, 3, 1)
        assert len(eye.seen) >= 3, (sampler, scheduler)
        ran.update(kernel for _, _, calls in eye.seen for _, kernel in calls)
        wrong += [(sampler, scheduler, *found) for found in wrong_forwards(eye, by_percent(model, 10, 70))]
    assert wrong == []
    assert ran == {"sdpa", "flash2"}


percents = st.one_of(st.integers(0, 100), st.sampled_from([25, 50, 75, 20, 40, 60, 80]), st.floats(0, 100)).map(float)
ranges = st.tuples(percents, percents).filter(lambda pair: pair[0] != pair[1]).map(sorted)
slow = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@slow
@given(data=st.data(), percent=ranges, steps=st.integers(2, 5), kind=st.sampled_from(KINDS))
def test_percents_hold_for_every_split_denoise_and_cfg(begin, eye, kind, data, percent, steps):
    from comfy.samplers import KSampler

    sampler, scheduler = data.draw(st.sampled_from(KSampler.SAMPLERS)), data.draw(st.sampled_from(KSampler.SCHEDULERS))
    more = {
        "cfg": data.draw(st.sampled_from([1.0, 3.0])),
        "negative_tokens": data.draw(st.sampled_from([6, 7])),  # 7 does not go into one batch with 6
        "denoise": data.draw(st.sampled_from([1.0, 0.75, 0.4])),
    }
    model, latent = begin(kind, Rule(("sdpa",)), Rule(("flash2",), from_percent=percent[0], to_percent=percent[1]))
    two_stages(model, latent, sampler, scheduler, steps, data.draw(st.integers(0, steps)), **more)
    assert eye.seen
    assert wrong_forwards(eye, by_percent(model, *percent)) == []
    if more["cfg"] != 1.0 and not sampler.endswith("cfg_pp"):
        sizes = {len(conds) for _, conds, _ in eye.seen}
        assert sizes == ({2} if more["negative_tokens"] == 6 else {1})


GUIDERS = ["basic", "cfg", "two conditionings", "two models"]


def custom_guider(name, model):
    """What the guider nodes make."""
    from comfy_extras import nodes_custom_sampler as custom

    if name == "basic":
        guider = custom.Guider_Basic(model)
        guider.set_conds([text(6)])
    elif name == "two conditionings":
        guider = custom.Guider_DualCFG(model)
        guider.set_conds([text(6)], [text(5)], [text(7)])
        guider.set_cfg(2.0, 3.0)
    else:
        dual = name == "two models" and hasattr(custom, "Guider_DualModel")  # hosts of this year
        guider = custom.Guider_DualModel(model, model.clone()) if dual else custom.comfy.samplers.CFGGuider(model)
        guider.set_conds([text(6)], [text(7)])
        guider.set_cfg(2.0)
    return guider


@slow
@given(data=st.data(), percent=ranges, guider=st.sampled_from(GUIDERS), kind=st.sampled_from(KINDS))
@example(data=None, percent=[0.0, 20.0], guider="basic", kind="wan")
def test_percents_hold_for_custom_sigmas_and_guiders(begin, eye, kind, data, percent, guider):
    """SamplerCustomAdvanced with sigmas that no scheduler made, also beyond the model's first one."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    model, latent = begin(kind, Rule(("sdpa",)), Rule(("flash2",), from_percent=percent[0], to_percent=percent[1]))
    most = float(model.get_model_object("model_sampling").sigma_max)
    if data is None:
        shares, sampler = [1.1, 0.9, 0.1], "euler"
    else:
        sampler = data.draw(st.sampled_from(["euler", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_2m", "churned"]))
        highest = 1.0 if sampler.startswith("dpm") else 1.2  # those take logarithms of 1 - sigma on flow models
        shares = data.draw(st.lists(st.floats(0.01, highest), min_size=2, max_size=4, unique=True).map(sorted))[::-1]
    churned = comfy.samplers.ksampler("heun", {"s_churn": 1.0})  # adds noise: above the first sigma
    SamplerCustomAdvanced.execute(
        Noise_RandomNoise(1),
        custom_guider(guider, model),
        churned if sampler == "churned" else comfy.samplers.sampler_object(sampler),
        torch.tensor([*(most * share for share in shares), 0.0]),
        {"samples": latent},
    )
    assert len(eye.seen) >= len(shares)
    assert wrong_forwards(eye, by_percent(model, *percent)) == []


@slow
@given(data=st.data(), percent=ranges, kind=st.sampled_from(KINDS))
def test_comfyui_itself_draws_the_line_at_the_same_place(begin, eye, data, percent, kind):
    """A second conditioning with a timestep range is there exactly in the forwards in which the rule is in force."""
    from comfy.samplers import KSampler

    model, latent = begin(kind, Rule(("sdpa",)), Rule(("flash2",), from_percent=percent[0], to_percent=percent[1]))
    ranged = text(6, start_percent=percent[0] / 100, end_percent=percent[1] / 100)
    sampler, scheduler = data.draw(st.sampled_from(KSampler.SAMPLERS)), data.draw(st.sampled_from(KSampler.SCHEDULERS))
    ksampler(model, latent, sampler, scheduler, 4, positive=[text(6), ranged], cfg=1.0)
    for sigma, conds, ran in eye.seen:
        if percent[0] > 0 or sigma <= 1:
            wanted = "flash2" if conds.count(0) == 2 else "sdpa"
            assert {kernel for _, kernel in ran} == {wanted}, float(sigma)


BLOCKS = {"wan": 6, "flux": 5, "eps": 7}


@slow
@given(data=st.data(), percent=ranges, kind=st.sampled_from(list(BLOCKS)))
def test_block_ranges_and_percents_hold_together(begin, eye, kind, data, percent):
    from comfyui_attune.nodes import AttentionRule

    first = data.draw(st.integers(0, BLOCKS[kind] - 1))
    last = data.draw(st.integers(first, BLOCKS[kind] - 1))

    def node(model):
        (under,) = AttentionRule.execute(model, kernel="sdpa").args
        return AttentionRule.execute(under, "flash2", percent[0], percent[1], f"{first}-{last}").args[0]

    model, latent = begin(kind, change=node)
    two_stages(model, latent, "heun", "simple", 3, 2)
    inside = by_percent(model, *percent)
    assert wrong_forwards(eye, lambda s, block: inside(s, block) if first <= block <= last else "sdpa") == []
    assert {block for _, _, ran in eye.seen for block, _ in ran} == set(range(BLOCKS[kind]))


# name, dense inputs → exact percents at both ends, exact blocks at both ends
SWITCHES = [
    ({"preset": "quality"}, (20, 20, 2, 2)),
    ({"preset": "balanced"}, (10, 10, 1, 1)),
    ({"preset": "speed"}, (3, 6, 0, 0)),
    ({"preset": "custom"}, (0, 0, 0, 0)),
    ({}, (0, 0, 0, 0)),
    ({"dense_first_percent": 30.0, "dense_last_blocks": 3}, (30, 0, 0, 3)),
    ({"preset": "balanced", "dense_first_percent": 35.0, "dense_last_percent": 2.0, "dense_last_blocks": 3},
     (35, 10, 1, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "dense"), SWITCHES, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_switch_keeps_exact_what_its_preset_and_inputs_say(begin, eye, kind, inputs, dense):
    from comfyui_attune.nodes import Sage3Switch

    model, latent = begin(kind, change=lambda model: Sage3Switch.execute(model, **inputs).args[0])
    two_stages(model, latent, "euler", "simple", 20, 9)
    first, last, first_blocks, last_blocks = dense

    def expected(sigma, block):
        ends = block < first_blocks or block >= BLOCKS[kind] - last_blocks
        ends = ends or (first > 0 and in_force(model, sigma, 0, first))
        return "sdpa" if ends or (last > 0 and in_force(model, sigma, 100 - last, 100)) else "sage3"

    assert wrong_forwards(eye, expected) == []
    kernels = {kernel for _, _, ran in eye.seen for _, kernel in ran}
    assert kernels == ({"sage3", "sdpa"} if any(dense) else {"sage3"})


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("preset", ["quality", "balanced", "speed"])
def test_a_model_with_fewer_blocks_than_a_preset_keeps_is_exact_in_all_of_them(host, tiny, layers, preset):
    from comfyui_attune.attention.call import AttentionCall
    from comfyui_attune.attention.plan import make_plan
    from comfyui_attune.nodes import Sage3Switch

    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(layers))
    model = tiny("wan")[0]
    model.model = SimpleNamespace(diffusion_model=net)
    router = (
        Sage3Switch.execute(model, preset=preset)
        .args[0]
        .model_options["transformer_options"]["optimized_attention_override"]
    )
    rules = [rule for rule in router.policy.rules if rule.always]
    chosen = [
        make_plan(
            AttentionCall(1, 1, 1, 9, 9, 64, 64, torch.float32, "cpu", block=block, blocks=router.blocks),
            rules, router.kernels, router.machine,
        ).name
        for block in range(layers)
    ]  # fmt: skip
    edge = {"quality": 2, "balanced": 1, "speed": 0}[preset]
    assert chosen == ["sdpa" if min(block, layers - 1 - block) < edge else "sage3" for block in range(layers)]
