"""Wan 2.2 with its two transformers: kernels by part of the sampling and by block. Tiny random weights, on the CPU.

in a checkout: pip install ".[diffusers]", then: python docs/examples/wan22.py
"""

import tiny_pipelines

import comfyui_attune as attune
from comfyui_attune import Policy, Rule

pipe, call = tiny_pipelines.wan(second=True)  # yours: WanPipeline.from_pretrained(…)

# The last rule that matches a call wins. A name that cannot run here falls back, and the report says why.
policy = Policy(
    (
        Rule(("sage2_fp8_cuda", "sdpa"), timed=True),  # 8 bit where the GPU has it
        Rule(("sdpa",), to_percent=20),  # the first steps decide what is where: exact
        Rule(("sdpa",), kind="cross"),  # short: nothing to gain
    )
)
with attune.applied(pipe, policy) as handle:
    video = tiny_pipelines.result(pipe, call)
    print(handle.report())
print(f"\n{video.shape[1]} frames of {video.shape[-1]} × {video.shape[-2]}.")
