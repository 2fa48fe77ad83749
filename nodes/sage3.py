"""Sage3Switch: SageAttention 3 where it pays, exact attention where quality needs it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.policy import BlockRange, Rule
from ..attention.record import Record
from ..host.comfyui import count_blocks
from .schema import CATEGORY, Schema, add_rules, model_inputs, model_outputs, widget

# SageAttention 3 is slower than SDPA below about a thousand tokens (docs/kernels.md).
_SHORT_TOKENS = 1024
_FEW_STEPS = 20


def advice(record: Record, steps: int) -> list[str]:
    """What to tell the user about this run of `steps` steps in all (0: unknown): is Sage3 worth having?"""
    lines = []
    tokens = record.longest_self
    if 0 < tokens < _SHORT_TOKENS:
        lines.append(f"Sage3 is not worth it here: {tokens:,} tokens, it gains from about {_SHORT_TOKENS:,}.")
    if 0 < steps < _FEW_STEPS:
        lines.append(f"Sage3 is not worth it for {steps} steps: it is meant for 20 or more, without a 4-step LoRA.")
    return lines


def dense_error(first: float, last: float) -> str | None:
    """What is wrong with the two dense percents, or None."""
    for name, value in (("dense_first_percent", first), ("dense_last_percent", last)):
        if not 0 <= value <= 100:
            return f"{name} {value:g} is not a percent; wanted 0 to 100."
    if first + last >= 100:
        return (
            f"dense_first_percent {first:g} and dense_last_percent {last:g} leave Sage3 nothing to do; "
            "wanted less than 100 together, or switch the node off."
        )
    return None


def dense_rules(first_percent: float, last_percent: float, first_blocks: int, last_blocks: int) -> list[Rule]:
    """Rules that keep the given ends of the sampling and of the model on exact kernels."""
    rules = []
    if first_percent > 0:
        rules.append(Rule(("sdpa",), to_percent=first_percent, exact_only=True))
    if last_percent > 0:
        rules.append(Rule(("sdpa",), from_percent=100 - last_percent, exact_only=True))
    if first_blocks > 0:
        rules.append(Rule(("sdpa",), blocks=BlockRange(0, first_blocks - 1), exact_only=True))
    if last_blocks > 0:
        rules.append(Rule(("sdpa",), blocks=BlockRange(-last_blocks, -1), exact_only=True))
    return rules


def _percent(name: str, which: str) -> Any:
    return widget(
        io.Float,
        name,
        default=0.0,
        min=0.0,
        max=100.0,
        step=1.0,
        round=0.01,
        advanced=True,
        tooltip=f"Keep the {which} part of the sampling on exact attention, in percent as ComfyUI counts it.",
    )


def _blocks(name: str, which: str) -> Any:
    return widget(
        io.Int,
        name,
        default=0,
        min=0,
        max=1000,
        advanced=True,
        tooltip=f"Keep this many of the model's {which} blocks on exact attention.",
    )


class Sage3Switch(io.ComfyNode):
    """A Sage3 rule and up to four dense rules over it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="Sage3Switch",
            display_name="Sage3 Switch",
            category=CATEGORY,
            description=(
                "Runs this model's attention on SageAttention 3 (4-bit, RTX 50 series and RTX PRO Blackwell). Worth it "
                "for long videos with 20 or more steps; not with a 4-step LoRA. Where it cannot run, whatever stood "
                "on the model before goes on. Bypass it (Ctrl+B) and the model is exactly as before."
            ),
            search_aliases=["sageattention 3", "sageattn3", "blackwell attention"],
            inputs=[
                model_inputs(),
                widget(io.Boolean, "enable", default=True, tooltip="Off: the model passes through untouched."),
                widget(
                    io.Boolean,
                    "per_block_mean",
                    default=False,
                    tooltip="A little more exact, and much more memory (10 GB at 720p, 81 frames).",
                ),
                _percent("dense_first_percent", "first"),
                _percent("dense_last_percent", "last"),
                _blocks("dense_first_blocks", "first"),
                _blocks("dense_last_blocks", "last"),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, dense_first_percent: float | None = None, dense_last_percent: float | None = None
    ) -> bool | str:
        return dense_error(dense_first_percent or 0, dense_last_percent or 0) or True

    @classmethod
    def execute(
        cls,
        model: object,
        enable: bool = True,
        per_block_mean: bool = False,
        dense_first_percent: float = 0.0,
        dense_last_percent: float = 0.0,
        dense_first_blocks: int = 0,
        dense_last_blocks: int = 0,
    ) -> io.NodeOutput:
        if not enable:
            return io.NodeOutput(model)
        _, blocks = count_blocks(model)
        for name, count in (("dense_first_blocks", dense_first_blocks), ("dense_last_blocks", dense_last_blocks)):
            if blocks is not None and count > blocks:
                raise ValueError(f"{name}: this model has {blocks} blocks, {count} were asked for. Set 0 to {blocks}.")
        wrong = dense_error(dense_first_percent, dense_last_percent)
        if wrong:
            raise ValueError(wrong)
        kernel = "sage3_per_block_mean" if per_block_mean else "sage3"
        dense = dense_rules(dense_first_percent, dense_last_percent, dense_first_blocks, dense_last_blocks)
        return add_rules(cls, model, Rule((kernel,)), *dense, advisor=advice)
