"""Real model families of ComfyUI, tiny and with random weights: every attention call they make is routed and right."""

from __future__ import annotations

import pytest
import torch

from comfyui_attune.attention.policy import Policy, Rule


def fill(net: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return net.eval()


def flux():
    from comfy.ldm.flux.model import Flux
    from comfy.ops import manual_cast

    net = Flux(
        in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=8, hidden_size=256, mlp_ratio=1.0, num_heads=2,
        depth=2, depth_single_blocks=3, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
        guidance_embed=False, txt_ids_dims=[], dtype=torch.float32, device="cpu", operations=manual_cast,
    )  # fmt: skip
    inputs = {"context": torch.randn(2, 5, 8), "y": torch.randn(2, 8)}
    return fill(net), (torch.randn(2, 4, 8, 8), torch.ones(2)), inputs, 5


def flux_with_a_mask():
    net, args, inputs, calls = flux()
    return net, args, {**inputs, "attention_mask": torch.randn(2, 1, 16 + 5, 16 + 5)}, calls


def sd3():
    """q and k are 3-D, v is 4-D, and most calls carry no transformer_options."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.ops import manual_cast

    net = OpenAISignatureMMDITWrapper(
        input_size=8, patch_size=2, in_channels=4, depth=2, adm_in_channels=8, pos_embed_max_size=8, num_patches=64,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 128}},
        qk_norm="rms", dtype=torch.float32, device="cpu", operations=manual_cast,
    )  # fmt: skip
    inputs = {"context": torch.randn(2, 5, 16), "y": torch.randn(2, 8)}
    return fill(net), (torch.randn(2, 4, 8, 8), torch.ones(2)), inputs, 2


def sd15():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import manual_cast

    net = UNetModel(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, channel_mult=(1, 2),
        num_head_channels=8, num_heads=-1, use_spatial_transformer=True, transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, context_dim=16, dtype=torch.float32,
        device="cpu", operations=manual_cast,
    )  # fmt: skip
    return fill(net), (torch.randn(2, 4, 8, 8), torch.ones(2)), {"context": torch.randn(2, 7, 16)}, 14


def ltxv():
    """Cross attention with a mask of shape (B, 1, 1, M)."""
    from comfy.ldm.lightricks.model import LTXVModel
    from comfy.ops import manual_cast

    net = LTXVModel(
        in_channels=8, cross_attention_dim=32, attention_head_dim=16, num_attention_heads=2, caption_channels=12,
        num_layers=2, dtype=torch.float32, device="cpu", operations=manual_cast,
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    args = (torch.randn(2, 8, 2, 4, 4), torch.ones(2), torch.randn(2, 5, 12), mask)
    return fill(net), args, {}, 4


def pixart():
    """No call carries transformer_options."""
    from comfy.ldm.pixart.pixartms import PixArtMS
    from comfy.ops import manual_cast

    net = PixArtMS(
        input_size=64, in_channels=4, hidden_size=64, depth=2, num_heads=2, caption_channels=16, micro_condition=False,
        dtype=torch.float32, device="cpu", operations=manual_cast,
    )  # fmt: skip
    return fill(net), (torch.randn(1, 4, 64, 64), torch.ones(1), torch.randn(1, 5, 16)), {}, 4


FAMILIES = [flux, flux_with_a_mask, sd3, sd15, ltxv, pixart]


@pytest.mark.parametrize("kernel", ["split", "sdpa", "basic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_of_the_model_is_routed_and_right(comfy, family, kernel):
    import comfy.ldm.modules.attention as module

    from comfyui_attune.attention.router import Router
    from comfyui_attune.attention.session import Forward, Session
    from comfyui_attune.host import comfyui as host
    from comfyui_attune.host import trampoline

    torch.manual_seed(0)
    net, args, inputs, calls = family()
    with torch.no_grad():
        expected = net(*[a.clone() for a in args], **inputs, transformer_options={})
        doubles, blocks = host.count_blocks(type("P", (), {"model": type("M", (), {"diffusion_model": net})})())
        router = Router(
            Policy((Rule((kernel,), source="1"),)), host.kernels(), host.machine(), host.LINK, doubles, blocks
        )
        session = Session(router)
        with trampoline.installed(module), Forward(router, session, frozenset({0})):
            out = net(
                *[a.clone() for a in args],
                **inputs,
                transformer_options={"optimized_attention_override": router},
            )
    assert session.record.observed() == {kernel: calls}, session.record.notes
    assert torch.isfinite(out).all()
    assert torch.allclose(out, expected, atol=1e-4)


def test_a_block_range_counts_double_blocks_before_single_ones(comfy):
    import comfy.ldm.modules.attention as module

    from comfyui_attune.attention.policy import BlockRange
    from comfyui_attune.attention.router import Router
    from comfyui_attune.attention.session import Forward, Session
    from comfyui_attune.host import comfyui as host
    from comfyui_attune.host import trampoline

    net, args, inputs, _ = flux()
    policy = Policy((Rule(("split",), source="1"), Rule(("basic",), blocks=BlockRange(1, 2), source="2")))
    router = Router(policy, host.kernels(), host.machine(), host.LINK, 2, 5)
    session = Session(router)
    with torch.no_grad(), trampoline.installed(module), Forward(router, session, frozenset({0, 1})):
        net(*args, **inputs, transformer_options={"optimized_attention_override": router})
    assert session.record.observed() == {"split": 3, "basic": 2}
