"""AttentionSelector: one kernel for a whole model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.policy import ERROR_BUDGET, Rule
from .schema import (
    ALIASES,
    CATEGORY,
    DISABLED,
    KERNELS,
    Schema,
    add_rules,
    kernel_error,
    model_inputs,
    model_outputs,
    widget,
)


class AttentionSelector(io.ComfyNode):
    """One rule for every attention call of the model, and one for cross attention where that is to differ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="AttentionSelector",
            display_name="Attention Selector",
            category=CATEGORY,
            description=(
                "Chooses the attention kernel of this model. Put it between the model loader and the sampler; 'auto' "
                "is right for most. What cannot run here falls back, and the node shows what really ran. Bypass it "
                "(Ctrl+B) and the model is exactly as before."
            ),
            search_aliases=["sage attention", "flash attention", "sdpa", "xformers", "attention backend"],
            inputs=[
                model_inputs(),
                widget(
                    io.Combo,
                    "kernel",
                    options=KERNELS,
                    default="auto",
                    tooltip="auto: the fastest this machine has, measured while you sample. host: what ComfyUI itself "
                    "does. Any other: exactly that one, where it can run.",
                ),
                widget(
                    io.Combo,
                    "precision",
                    options=["exact", "fast"],
                    default="exact",
                    tooltip="For 'auto' only. exact: results as from standard attention. fast: also kernels that "
                    "compute in 8 bits, quicker and slightly different.",
                ),
                widget(
                    io.Combo,
                    "when_unavailable",
                    options=["fallback", "error"],
                    default="fallback",
                    tooltip="What to do where the chosen kernel cannot run. fallback: go on with what stood on the "
                    "model before, at last ComfyUI's own attention, and say why. error: stop before sampling.",
                ),
                widget(
                    io.Combo,
                    "cross_attention",
                    options=["same", *KERNELS],
                    default="same",
                    advanced=True,
                    tooltip="The kernel for cross attention (to the text). Its sequences are short: fast kernels "
                    "gain little there.",
                ),
                widget(
                    io.Int,
                    "min_tokens",
                    default=0,
                    min=0,
                    max=10_000_000,
                    advanced=True,
                    tooltip="Leave calls with fewer query tokens than this to what stood on the model before, at last "
                    "ComfyUI's own attention. Short calls gain nothing from fast kernels.",
                ),
                widget(
                    io.Float,
                    "error_budget",
                    default=ERROR_BUDGET,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,  # prompts from before it was there stay valid
                    advanced=True,
                    tooltip="For 'auto' with precision 'fast': how far from exact attention a kernel's results may be, "
                    "measured while sampling (relative L1). 0 means exact kernels only.",
                ),
                widget(
                    io.Boolean,
                    "time_calls",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Time every attention call of this model, for the report: which kernel took which share.",
                ),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, kernel: str | None = None, cross_attention: str | None = None) -> bool | str:
        # Naming an input here switches off the host's own check, which counts the names instead of listing them.
        wrong_cross = None if cross_attention == "same" else kernel_error(cross_attention, may_be_off=False)
        return kernel_error(kernel) or (f"cross_attention: {wrong_cross}" if wrong_cross else True)

    @classmethod
    def execute(
        cls,
        model: object,
        kernel: str = "auto",
        precision: str = "exact",
        when_unavailable: str = "fallback",
        cross_attention: str = "same",
        min_tokens: int = 0,
        error_budget: float = ERROR_BUDGET,
        time_calls: bool = False,
    ) -> io.NodeOutput:
        if kernel in (DISABLED, False):
            return io.NodeOutput(model)

        def kernels(name: str) -> tuple[str, ...]:
            name = ALIASES.get(name, name)
            return ("auto_fast",) if name == "auto" and precision == "fast" else (name,)

        on_refusal = "error" if when_unavailable == "error" else "fall_through"
        same: dict[str, Any] = {
            "min_tokens": min_tokens,
            "on_refusal": on_refusal,
            "error_budget": error_budget,
            "timed": time_calls,
        }
        rules = [Rule(kernels(kernel), **same)]
        if cross_attention != "same":
            rules.append(Rule(kernels(cross_attention), kind="cross", **same))
        return add_rules(cls, model, *rules)
