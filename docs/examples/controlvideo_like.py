"""A ControlVideo-like pipeline: modules with their own `_attention`, set to an xformers that is broken on this GPU.

in a checkout: pip install ".[diffusers]", then: python docs/examples/controlvideo_like.py
"""

import tiny_pipelines
from controlvideo_modules import FullyFrameAttention, IndividualAttention, controlvideo_like

import comfyui_attune as attune

pipe, call = tiny_pipelines.sd15()
controlvideo_like(pipe.unet)  # what ControlVideo's own UNet is made of
for module in pipe.unet.modules():
    if isinstance(module, (FullyFrameAttention, IndividualAttention)):
        module._use_memory_efficient_attention_xformers = True

try:
    tiny_pipelines.result(pipe, call)
except RuntimeError as error:
    print(f"Before: RuntimeError: {error}\n")

# No file of ControlVideo was edited. xformers stays installed; its call is bypassed, and no score tensor is made.
with attune.applied(pipe, "sdpa") as handle:
    tiny_pipelines.result(pipe, call)
    print(handle.report())
