"""AttentionCapture: real q, k and v of a model as a file, for measuring kernels on them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.capture import add_capture, parse_steps
from ..host.captured_run import Wanted
from ..host.comfyui import count_blocks, switched_off
from ..host.output_file import output_path
from .schema import CATEGORY, Schema, blocks_error, read_blocks, widget

_MOST_MIB = 1 << 20


def _steps_error(text: object) -> str | None:
    if text is None:
        return None
    try:
        parse_steps(str(text))
    except ValueError as error:
        return str(error)
    return None


class AttentionCapture(io.ComfyNode):
    """Saves the tensors of attention calls while the model is sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="AttentionCapture",
            display_name="Attention Capture",
            category=CATEGORY,
            description=(
                "Saves what attention gets in a real sampling run, the tensors q, k and v of a few calls, so that "
                "kernels can be measured on it: attune bench --inputs FILE. Put it anywhere between the model loader "
                "and the sampler. Each run writes a new file to ComfyUI's output folder when it ends; the node shows "
                "which. Bypass it (Ctrl+B) when you have what you want."
            ),
            search_aliases=["save attention tensors", "dump qkv", "attention inputs"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model whose attention calls are saved. It is cloned; the model that comes in stays "
                    "as it is, and results do not change.",
                ),
                widget(
                    io.String,
                    "blocks",
                    default="0",
                    tooltip="Which blocks of the model, counted from 0: one such as 5, a range such as 2-37, empty "
                    "for all. Flux and its kin count double blocks first, then single ones; a UNet its transformers.",
                ),
                widget(
                    io.String,
                    "steps",
                    default="0",
                    tooltip="Which steps of the sampler, counted from 0: such as 0, 10 or 4-7, empty for all. Each "
                    "sampler of a two-stage workflow counts its own. Of each step the first forward is saved.",
                ),
                widget(
                    io.Combo,
                    "kind",
                    options=["both", "self", "cross"],
                    default="both",
                    tooltip="self: a picture or video with itself. cross: with something of another length, such as "
                    "the text.",
                ),
                widget(
                    io.Int,
                    "max_mib",
                    default=2048,
                    min=1,
                    max=_MOST_MIB,
                    tooltip="The most that is saved in one prompt, in MiB; calls that do not fit are left out. It is "
                    "held in the computer's memory until the run ends, and each call that is saved makes the GPU wait.",
                ),
                widget(
                    io.String,
                    "filename_prefix",
                    default="attune/capture",
                    tooltip="Folder and name below ComfyUI's output folder; files are numbered, none is overwritten.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The same model; its next runs are captured."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, blocks: str | None = None, steps: str | None = None) -> bool | str:
        wrong_blocks, wrong_steps = blocks_error(blocks), _steps_error(steps)
        if wrong_blocks:
            return f"blocks: {wrong_blocks}"
        return f"steps: {wrong_steps}" if wrong_steps else True

    @classmethod
    def execute(
        cls,
        model: Any,
        blocks: str = "0",
        steps: str = "0",
        kind: str = "both",
        max_mib: int = 2048,
        filename_prefix: str = "attune/capture",
    ) -> io.NodeOutput:
        if switched_off():
            return io.NodeOutput(model)
        if not hasattr(model, "add_wrapper_with_key"):
            raise ValueError(
                f"a model of type {type(model).__name__} cannot be captured: wanted a ComfyUI MODEL, as the loaders "
                "of ComfyUI give it."
            )
        if max_mib < 1:  # linked inputs are not seen by the host's own check
            raise ValueError(f"max_mib {max_mib} leaves no room for anything; wanted 1 or more")
        if wrong := _steps_error(steps):
            raise ValueError(f"steps: {wrong}")
        output_path(filename_prefix, ".safetensors")  # told now, not after minutes of sampling
        wanted = Wanted(
            blocks=read_blocks(model, blocks),
            steps=parse_steps(steps),
            kind=None if kind == "both" else kind,
            size=max_mib << 20,
            prefix=filename_prefix,
        )
        source = str(cls.hidden.unique_id or "AttentionCapture")
        return io.NodeOutput(add_capture(model, wanted, source, count_blocks(model)[0]))
