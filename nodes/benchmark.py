"""AttentionBenchmark: the kernels of this machine, timed on the shapes of a model."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from .schema import CATEGORY, Schema, widget

# "from the model" is host/benchmark.py's FROM_MODEL, the others are the sets of measure/shapes.py: shared workflows
# hold them, so the list only grows at its end.
SHAPES = [
    "from the model",
    "wan2.2-14b",
    "wan2.2-5b",
    "flux-1024",
    "qwen-image-1328",
    "sdxl-1024",
    "hunyuanvideo",
    "ltxv",
    "smoke",
]


class AttentionBenchmark(io.ComfyNode):
    """Measures; changes nothing. Works alone on a graph, with one of the sets of shapes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="AttentionBenchmark",
            display_name="Attention Benchmark",
            category=CATEGORY,
            description=(
                "Times every attention kernel that works on this machine, with its error: on the shapes of your model "
                "(connect model, positive and latent as at the sampler; one step is sampled to see them) or on those "
                "of well-known models. Gives a picture, a table and a CSV file in ComfyUI's output folder. It measures "
                "anew only when an input changes."
            ),
            search_aliases=["attention speed", "fastest attention", "compare attention kernels", "bench"],
            inputs=[
                widget(
                    io.Combo,
                    "shapes",
                    options=SHAPES,
                    default=SHAPES[0],
                    tooltip="from the model: what the connected model really does. Any other: the usual sizes of that "
                    "model, whatever is connected. smoke: small ones, for a first try.",
                ),
                widget(
                    io.Combo,
                    "kernels",
                    options=["all", "exact"],
                    default="all",
                    tooltip="all: whatever the doctor found to work here. exact: without those that compute in fewer "
                    "bits.",
                ),
                widget(
                    io.Float,
                    "seconds",
                    default=1.0,
                    min=0.1,
                    max=60.0,
                    step=0.1,
                    tooltip="Time for each kernel on each shape, about. More makes the figures steadier.",
                ),
                widget(
                    io.Combo,
                    "dtype",
                    options=["auto", "fp16", "bf16", "fp32"],
                    default="auto",
                    advanced=True,
                    tooltip="For the sets of shapes. auto: fp32 on a CPU, bf16 on GPUs, fp16 on those before Ampere. "
                    "From the model: what it computes in.",
                ),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    advanced=True,
                    tooltip="Of the numbers in the tensors. Change it to measure again.",
                ),
                widget(
                    io.Model,
                    "model",
                    optional=True,
                    tooltip="The model whose attention is measured. Nodes of this pack on it are left out of account.",
                ),
                widget(
                    io.Conditioning, "positive", optional=True, tooltip="The positive conditioning, as at the sampler."
                ),
                widget(
                    io.Conditioning,
                    "negative",
                    optional=True,
                    tooltip="The negative one, where the sampler's cfg is above 1: both are often one batch.",
                ),
                widget(io.Latent, "latent", optional=True, tooltip="The latent, as at the sampler: it sets the size."),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Speed by shape, and speed against error."),
                io.String.Output(display_name="table", tooltip="Every figure, fastest first, and what was not run."),
                io.String.Output(display_name="csv_path", tooltip="The CSV file, for attune compare or a spreadsheet."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],  # the last two: a saved picture
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        shapes: str = SHAPES[0],
        kernels: str = "all",
        seconds: float = 1.0,
        dtype: str = "auto",
        seed: int = 0,
        model: Any = None,
        positive: Any = None,
        negative: Any = None,
        latent: Any = None,
    ) -> io.NodeOutput:
        from ..host.benchmark import Asked, benchmark  # only now: it would cost every start of ComfyUI some time

        asked = Asked(shapes, kernels == "exact", seconds, seed, dtype)
        pixels, text, path = benchmark(asked, model, positive, negative, latent)
        plot = torch.from_numpy(pixels).float().div(255).unsqueeze(0)
        shown = ui.PreviewImage(plot, cls=cls).as_dict()
        return io.NodeOutput(plot, text, path, ui={**shown, "text": (text,)})
