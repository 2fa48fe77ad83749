"""AttentionDoctor: what attention kernels do on this machine, as text and as a picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from .schema import CATEGORY, Schema


class AttentionDoctor(io.ComfyNode):
    """Shows the doctor's report of this moment. Works alone on a graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="AttentionDoctor",
            display_name="Attention Doctor",
            category=CATEGORY,
            description=(
                "Tries every attention kernel on this machine, each in a process of its own so that nothing can take "
                "ComfyUI down, and shows which ones work, how exact and how fast they are, why the others do not work "
                "and what to type. Takes up to some minutes the first time; afterwards it remembers, until something "
                "on the machine changes."
            ),
            search_aliases=["attention report", "which attention", "gpu info", "sageattention not working"],
            inputs=[],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report, with every command in full."),
                io.Image.Output(display_name="picture", tooltip="The report as a picture, for Save Image."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],  # the last two: a saved picture
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls) -> float:
        return float("nan")  # a new one equals none before it: a verdict may have come in since the last prompt

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..host.doctor import look  # only now: it would cost every start of ComfyUI some 50 ms

        text, pixels = look()
        picture = torch.from_numpy(pixels).float().div(255).unsqueeze(0)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(text, picture, ui={**shown, "text": (text,)})
