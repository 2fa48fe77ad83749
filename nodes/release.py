"""ReleaseModel: between two passes, the first one's model makes room for the second one's."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.release import release
from ..host.server import say_on_node
from .schema import CATEGORY, Schema, any_type


class ReleaseModel(io.ComfyNode):
    """Passes any value through and has ComfyUI unload a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        kind, matching = any_type("value")
        return Schema(
            node_id="ReleaseModel",
            display_name="Release Model",
            category=CATEGORY,
            description=(
                "Frees a model's memory on the GPU when the value has come so far, through ComfyUI's own bookkeeping: "
                "whoever needs the model later gets it loaded again. Put it on the latent between two samplers, with "
                "the first one's model, where the second model would otherwise be loaded in part."
            ),
            search_aliases=["delete model", "unload model", "free vram", "release memory", "DeleteModelPassthrough"],
            inputs=[
                kind.Input("value", tooltip="Anything that was made with the model, such as a latent.", **matching),
                io.Model.Input("model", tooltip="The model to unload, as it went into the sampler before."),
            ],
            outputs=[
                kind.Output(display_name="value", tooltip="What came in.", **matching),
                io.String.Output(display_name="text", tooltip="What was freed."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, value: Any, model: Any) -> io.NodeOutput:
        text = release(model)
        say_on_node(text)
        return io.NodeOutput(value, text)
