"""Tiny diffusers pipelines with random weights: nothing is downloaded, and a call takes a fraction of a second.

Prompts are given as embeddings, so that no tokenizer is needed. Each function returns (pipeline, arguments of a call).
The examples stand on them, and the tests.
"""

from __future__ import annotations

import torch

STEPS = 2


def _seeded(make):
    torch.manual_seed(0)
    return make().eval()


def generator():
    return torch.Generator().manual_seed(0)


def _vae(**more):
    from diffusers import AutoencoderKL

    return _seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 16),
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **more,
        )
    )


def unet(**more):
    from diffusers import UNet2DConditionModel

    options = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 16, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16, "norm_num_groups": 4, "attention_head_dim": 2,
    }  # fmt: skip
    return _seeded(lambda: UNet2DConditionModel(**{**options, **more}))


def _scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def sd15(**more):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=_vae(), text_encoder=None, tokenizer=None, unet=unet(**more), scheduler=_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return _quiet(pipe), _image_call()


def sd15_controlnet(count=1):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    def controlnet():
        made = _seeded(
            lambda: ControlNetModel(
                block_out_channels=(16, 32),
                layers_per_block=1,
                in_channels=4,
                cross_attention_dim=16,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                norm_num_groups=4,
                attention_head_dim=2,
                conditioning_embedding_out_channels=(8, 16),
            )
        )
        for parameter in made.parameters():  # its outputs begin as zeros
            torch.nn.init.normal_(parameter, std=0.05)
        return made

    nets = [controlnet() for _ in range(count)]
    pipe = StableDiffusionControlNetPipeline(
        vae=_vae(), text_encoder=None, tokenizer=None, unet=unet(), scheduler=_scheduler(), safety_checker=None,
        controlnet=nets[0] if count == 1 else nets, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    hint = torch.rand(1, 3, 32, 32, generator=generator())
    return _quiet(pipe), {**_image_call(), "image": hint if count == 1 else [hint] * count}


def _image_call():
    return {
        "prompt_embeds": torch.randn(1, 7, 16, generator=generator()),
        "negative_prompt_embeds": torch.zeros(1, 7, 16),
        "height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "pt",
    }  # fmt: skip


def sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    net = unet(
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=net,
        scheduler=EulerDiscreteScheduler(), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pooled = torch.randn(1, 16, generator=generator())
    return _quiet(pipe), {
        **_image_call(), "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros(1, 16),
    }  # fmt: skip


def animatediff():
    from diffusers import AnimateDiffPipeline, MotionAdapter

    adapter = _seeded(
        lambda: MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        )
    )
    pipe = AnimateDiffPipeline(
        vae=_vae(), text_encoder=None, tokenizer=None, unet=unet(), motion_adapter=adapter, scheduler=_scheduler()
    )
    return _quiet(pipe), {**_image_call(), "num_frames": 2}


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    net = _seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
        )
    )
    vae = _one_channel_vae()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=net,
    )  # fmt: skip
    return _quiet(pipe), {
        "prompt_embeds": torch.randn(1, 6, 32, generator=generator()),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=generator()),
        "height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "pt",
    }  # fmt: skip


def _one_channel_vae():
    from diffusers import AutoencoderKL

    return _seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4,),
            in_channels=3,
            out_channels=3,
            latent_channels=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
            scaling_factor=1.5035,
        )
    )


def wan(second=False):
    """Wan 2.1; with `second` Wan 2.2, whose second transformer takes over at low noise."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    def transformer():
        return _seeded(
            lambda: WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=16,
                out_channels=16,
                text_dim=32,
                freq_dim=256,
                ffn_dim=32,
                num_layers=2,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=32,
            )
        )

    vae = _seeded(
        lambda: AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    more = {"transformer_2": transformer(), "boundary_ratio": 0.875} if second else {}
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer(), **more
    )
    return _quiet(pipe), {
        "prompt_embeds": torch.randn(1, 8, 32, generator=generator()),
        "negative_prompt_embeds": torch.zeros(1, 8, 32),
        "height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 3, "output_type": "pt",
    }  # fmt: skip


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def result(pipe, call):
    """What the pipeline makes: one tensor. The same for the same weights and kernel."""
    out = pipe(**call, generator=generator(), return_dict=False)[0]
    return out if isinstance(out, torch.Tensor) else torch.as_tensor(out)
