"""AttentionRule: the mechanism under the other nodes, with everything to set."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.policy import Rule
from .schema import (
    ALIASES,
    CATEGORY,
    DISABLED,
    KERNELS,
    Schema,
    add_rules,
    blocks_error,
    kernel_error,
    model_inputs,
    model_outputs,
    percent_error,
    read_blocks,
    widget,
)


class AttentionRule(io.ComfyNode):
    """One rule: a kernel for a part of the sampling, of the blocks, of the kinds of attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="AttentionRule",
            display_name="Attention Rule",
            category=CATEGORY,
            description=(
                "Adds one rule to whatever stands on the model: this kernel, for this part of the sampling, these "
                "blocks, this kind of attention. Chain several; where two match, the last one wins, and what it "
                "cannot run goes to the one before."
            ),
            search_aliases=["attention schedule", "attention per step", "attention per block"],
            inputs=[
                model_inputs(),
                widget(io.Combo, "kernel", options=KERNELS, default="auto", tooltip="The kernel for the calls below."),
                widget(
                    io.Float,
                    "from_percent",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=1.0,
                    round=0.01,
                    tooltip="Where in the sampling the rule begins, as ComfyUI counts it (start_percent × 100): by "
                    "noise level, not by steps, so it is the same on both stages of a two-stage workflow.",
                ),
                widget(
                    io.Float,
                    "to_percent",
                    default=100.0,
                    min=0.0,
                    max=100.0,
                    step=1.0,
                    round=0.01,
                    tooltip="Where in the sampling the rule ends (end_percent × 100).",
                ),
                widget(
                    io.String,
                    "blocks",
                    default="",
                    tooltip="Which blocks of the model, counted from 0: one such as 5, a range such as 2-37, empty "
                    "for all. Flux and its kin count double blocks first, then single ones; a UNet its transformers.",
                ),
                widget(
                    io.Combo,
                    "kind",
                    options=["both", "self", "cross"],
                    default="both",
                    tooltip="self: a picture or video with itself. cross: with something of another length, such as "
                    "the text.",
                ),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        kernel: str | None = None,
        from_percent: float | None = None,
        to_percent: float | None = None,
        blocks: str | None = None,
    ) -> bool | str:
        wrong_blocks = blocks_error(blocks)
        return (
            kernel_error(kernel)
            or percent_error(from_percent, to_percent)
            or (f"blocks: {wrong_blocks}" if wrong_blocks else True)
        )

    @classmethod
    def execute(
        cls,
        model: object,
        kernel: str = "auto",
        from_percent: float = 0.0,
        to_percent: float = 100.0,
        blocks: str = "",
        kind: str = "both",
    ) -> io.NodeOutput:
        if kernel in (DISABLED, False):
            return io.NodeOutput(model)
        error = percent_error(from_percent, to_percent)  # linked inputs are not seen by validate_inputs
        if error:
            raise ValueError(error)
        rule = Rule(
            (ALIASES.get(kernel, kernel),),
            from_percent=from_percent,
            to_percent=to_percent,
            blocks=read_blocks(model, blocks),
            kind=None if kind == "both" else kind,
        )
        return add_rules(cls, model, rule)
