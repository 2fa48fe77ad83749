"""Stable Diffusion 1.5 with a ControlNet: one call covers UNet, ControlNet and VAE. Tiny random weights, on the CPU.

in a checkout: pip install ".[diffusers]", then: python docs/examples/stable_diffusion_controlnet.py
"""

import tiny_pipelines

import comfyui_attune as attune

pipe, call = tiny_pipelines.sd15_controlnet()  # yours: StableDiffusionControlNetPipeline.from_pretrained(…)
before = tiny_pipelines.result(pipe, call)

# A T4 with little memory: one slice of the scores at a time. "auto" would measure what is fastest here.
handle = attune.apply(pipe, "split")
image = tiny_pipelines.result(pipe, call)
print(handle.report())
handle.remove()

print(f"\nThe same picture but for rounding: the largest difference is {float((image - before).abs().max()):.1g}.")
