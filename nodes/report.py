"""AttentionReport: what ran in the sampling that a value came from."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from .schema import CATEGORY, Schema, any_type, widget


class AttentionReport(io.ComfyNode):
    """Passes any value through, so that it runs after the sampler, and tells what ran before."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        kind, matching = any_type("value")
        return Schema(
            node_id="AttentionReport",
            display_name="Attention Report",
            category=CATEGORY,
            description=(
                "Tells which attention kernel ran in which block at which step of the sampling before it, what it "
                "cost, how exact it was, and what did not go as planned. Put it behind the sampler: what comes in at "
                "'value' goes out unchanged."
            ),
            search_aliases=["which attention", "attention heat map", "attention statistics", "what ran"],
            inputs=[
                kind.Input(
                    "value", tooltip="Anything that comes from the sampler: its latent, or the picture.", **matching
                ),
                widget(
                    io.Model,
                    "model",
                    optional=True,
                    tooltip="Leave it empty for everything that was sampled for this value. Connected: only the runs "
                    "of this model, as it comes out of its last attention node.",
                ),
            ],
            outputs=[
                kind.Output(display_name="value", tooltip="What came in.", **matching),
                io.String.Output(display_name="text", tooltip="The report."),
                io.Image.Output(display_name="picture", tooltip="The report as a picture, for Save Image."),
                io.String.Output(display_name="json_path", tooltip="The file of each run that was kept, one per line."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],  # the last two: a saved picture
            is_output_node=True,
        )

    @classmethod
    def execute(cls, value: Any, model: Any = None) -> io.NodeOutput:
        from ..host.run_report import report  # only now: matplotlib's reader of fonts need not be there at start

        text, pixels, files = report(model, str(cls.hidden.unique_id))
        picture = torch.from_numpy(pixels).float().div(255).unsqueeze(0)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(value, text, picture, files, ui={**shown, "text": (text,)})
