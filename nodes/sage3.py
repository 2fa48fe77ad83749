"""Sage3Switch: SageAttention 3 where it pays, exact attention where quality needs it."""

from __future__ import annotations

from typing import Any, NamedTuple

from comfy_api.latest import io

from ..attention.policy import BlockRange, Rule
from ..attention.record import Record
from ..host.attachment import Advisor
from ..host.comfyui import count_blocks
from .schema import CATEGORY, Schema, add_rules, model_inputs, model_outputs, widget

# SageAttention 3 is slower than SDPA below about a thousand tokens (docs/kernels.md).
_SHORT_TOKENS = 1024
_FEW_STEPS = 20


class Dense(NamedTuple):
    """What stays on exact kernels: percents of the sampling, and numbers of blocks, at its beginning and its end."""

    first_percent: float = 0.0
    last_percent: float = 0.0
    first_blocks: int = 0
    last_blocks: int = 0

    def __str__(self) -> str:
        percents = [f"0–{self.first_percent:g}"] if self.first_percent > 0 else []
        percents += [f"{100 - self.last_percent:g}–100"] if self.last_percent > 0 else []
        ends = [(end, n) for end, n in (("first", self.first_blocks), ("last", self.last_blocks)) if n > 0]
        blocks = [f"the {end}" if n == 1 else f"the {end} {n}" for end, n in ends]
        parts = [f"percent {' and '.join(percents)}"] if percents else []
        parts += [f"{' and '.join(blocks)} block{'s' if ends[-1][1] > 1 else ''}"] if blocks else []
        return ", ".join(parts) or "nothing"


CUSTOM = "custom"
# Artefacts of 4-bit attention come from both ends: SageAttention 3's README and WanVideoWrapper keep the first and the
# last step off it (ComfyUI issue 10076), ComfyUI's own draft of such a node these and the first and the last block
# (ComfyUI pull request 11571). "speed" is the former: 3 and 6 lie between the steps of 20 to 33, so that no rounding
# decides whether the last one counts. "balanced" is the latter with a tenth of the sampling instead of a step. With 20
# steps and 40 blocks Sage3 gets 90, 71 and 50 % of the calls. Workflows hold the names: this only grows, at its end.
PRESETS: dict[str, Dense] = {
    CUSTOM: Dense(),
    "quality": Dense(20, 20, 2, 2),
    "balanced": Dense(10, 10, 1, 1),
    "speed": Dense(3, 6, 0, 0),
}


def advice(record: Record, steps: int) -> list[str]:
    """What to tell the user about this run of `steps` steps in all (0: unknown): is Sage3 worth having?"""
    lines = []
    tokens = record.longest_self
    if 0 < tokens < _SHORT_TOKENS:
        lines.append(f"Sage3 is not worth it here: {tokens:,} tokens, it gains from about {_SHORT_TOKENS:,}.")
    if 0 < steps < _FEW_STEPS:
        lines.append(f"Sage3 is not worth it for {steps} steps: it is meant for 20 or more, without a 4-step LoRA.")
    return lines


def wrong_input(preset: str, asked: Dense) -> str | None:
    """What is wrong with the preset and the dense percents, or None."""
    if preset not in tuple(PRESETS):  # an API prompt may hold anything
        return f"preset: there is none called {preset!r}. The names are: {', '.join(PRESETS)}."
    for name, value in (("dense_first_percent", asked.first_percent), ("dense_last_percent", asked.last_percent)):
        if not 0 <= value <= 100:
            return f"{name} {value:g} is not a percent; wanted 0 to 100."
    dense = with_preset(preset, asked)
    if dense.first_percent + dense.last_percent >= 100:
        of_preset = "" if preset == CUSTOM else f" (the larger of what is set and of preset {preset})"
        return (
            f"dense_first_percent {dense.first_percent:g} and dense_last_percent {dense.last_percent:g}{of_preset} "
            "leave Sage3 nothing to do; wanted less than 100 together, or switch the node off."
        )
    return None


def with_preset(preset: str, asked: Dense) -> Dense:
    """The larger of the preset and of what the user asked for, number by number."""
    return Dense(*map(max, PRESETS[preset], asked))


def dense_rules(dense: Dense) -> list[Rule]:
    """Rules that keep the given ends of the sampling and of the model on exact kernels.

    A model with fewer blocks than that is exact in all of them.
    """
    rules = []
    if dense.first_percent > 0:
        rules.append(Rule(("sdpa",), to_percent=dense.first_percent, exact_only=True))
    if dense.last_percent > 0:
        rules.append(Rule(("sdpa",), from_percent=100 - dense.last_percent, exact_only=True))
    if dense.first_blocks > 0:
        rules.append(Rule(("sdpa",), blocks=BlockRange(0, dense.first_blocks - 1), exact_only=True))
    if dense.last_blocks > 0:
        rules.append(Rule(("sdpa",), blocks=BlockRange(-dense.last_blocks, -1), exact_only=True))
    return rules


def _advisor(kernel: str, preset: str, dense: Dense) -> Advisor:
    """`advice`, and before it which preset stands behind the rules and whether it left anything to do."""

    def advise(record: Record, steps: int) -> list[str]:
        lines = [] if preset == CUSTOM else [f"Preset {preset}: {dense} stay exact."]
        # What a node keeps exact itself is no refusal: with none of those, and the kernel never run, it kept all.
        mine = [node for node in record.nodes().values() if node.requested == kernel and node.calls]
        if any(dense) and any(kernel not in node.observed and not node.refused for node in mine):
            lines.append("Sage3 had nothing to do: every call of this run lies in a part that stays exact.")
        return lines + advice(record, steps)

    return advise


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
                widget(
                    io.Combo,
                    "preset",
                    options=list(PRESETS),
                    default=CUSTOM,
                    optional=True,  # prompts from before there were presets do not have it
                    tooltip="What stays on exact attention. "
                    + " ".join(f"{name}: {dense}." for name, dense in PRESETS.items() if name != CUSTOM)
                    + " custom: the four dense inputs alone. Where a dense input is larger than the preset, it counts.",
                ),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        dense_first_percent: float | None = None,
        dense_last_percent: float | None = None,
        preset: str | None = None,
    ) -> bool | str:
        asked = Dense(dense_first_percent or 0, dense_last_percent or 0)
        return wrong_input(CUSTOM if preset is None else preset, asked) or True

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
        preset: str = CUSTOM,
    ) -> io.NodeOutput:
        if not enable:
            return io.NodeOutput(model)
        _, blocks = count_blocks(model)
        for name, count in (("dense_first_blocks", dense_first_blocks), ("dense_last_blocks", dense_last_blocks)):
            if blocks is not None and count > blocks:
                raise ValueError(f"{name}: this model has {blocks} blocks, {count} were asked for. Set 0 to {blocks}.")
        asked = Dense(dense_first_percent, dense_last_percent, dense_first_blocks, dense_last_blocks)
        wrong = wrong_input(preset, asked)  # linked inputs are not seen by validate_inputs
        if wrong:
            raise ValueError(wrong)
        dense = with_preset(preset, asked)
        kernel = "sage3_per_block_mean" if per_block_mean else "sage3"
        return add_rules(cls, model, Rule((kernel,)), *dense_rules(dense), advisor=_advisor(kernel, preset, dense))
