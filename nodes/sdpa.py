"""SDPAForce: PyTorch's own attention, with the back ends in the order the user wants."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.policy import Rule
from .schema import CATEGORY, Schema, add_rules, model_inputs, model_outputs, widget

_BACKENDS = ["flash", "efficient", "cudnn", "math"]
_NONE = "none"
_PLACES = ("first", "second", "third", "fourth")


class SDPAForce(io.ComfyNode):
    """One rule that names SDPA back ends in order."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="SDPAForce",
            display_name="SDPA Force",
            category=CATEGORY,
            description=(
                "Runs this model's attention on PyTorch's own scaled dot product attention, with the back ends tried "
                "in your order. Always exact and needs no extra package: use it when another kernel gives trouble."
            ),
            search_aliases=["pytorch attention", "scaled dot product attention", "cudnn attention"],
            inputs=[
                model_inputs(),
                *(
                    widget(
                        io.Combo,
                        place,
                        options=_BACKENDS if place == "first" else [*_BACKENDS, _NONE],
                        default=backend,
                        tooltip=f"The {place} back end to try. flash: fast, no masks. efficient: any mask, little "
                        "memory. cudnn: often fastest on Hopper. math: always works, uses most memory.",
                    )
                    for place, backend in zip(_PLACES, _BACKENDS, strict=True)
                ),
                widget(
                    io.Boolean,
                    "strict",
                    default=False,
                    tooltip="Only these back ends: stop with an error where none of them can run, instead of "
                    "falling back.",
                ),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        first: str = "flash",
        second: str = "efficient",
        third: str = "cudnn",
        fourth: str = "math",
        strict: bool = False,
    ) -> io.NodeOutput:
        chosen = dict.fromkeys(f"sdpa_{name}" for name in (first, second, third, fourth) if name != _NONE)
        return add_rules(cls, model, Rule(tuple(chosen), on_refusal="error" if strict else "fall_through"))
