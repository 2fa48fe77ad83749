"""Nodes of other packs, so that workflows that name them load here with the same meaning.

Each is registered only where no other pack has its id (nodes/__init__.py). New workflows should use our own nodes.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.policy import Rule
from ..host.release import release
from ..host.server import say_on_node
from .sage3 import advice
from .schema import ALIASES, CATEGORY, DISABLED, Schema, add_rules, kernel_error, model_inputs, model_outputs, widget

_UNUSED = "Kept so that the workflow loads. Has no effect here: "
_SAGE_VALUES = [DISABLED, "auto", *ALIASES]


class Sage3AttentionOnlySwitch(io.ComfyNode):
    """What Sage3Switch does; `print_backend` is not needed, as the node shows what ran."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="Sage3AttentionOnlySwitch",
            display_name="Sage3 Attention Only Switch (use Sage3 Switch)",
            category=CATEGORY,
            description="Stands in for the node of the same name. Acts on this model only, and bypassing it undoes it.",
            is_deprecated=True,
            inputs=[
                model_inputs(),
                widget(io.Boolean, "enable", default=True, tooltip="Off: the model passes through untouched."),
                widget(
                    io.Boolean,
                    "print_backend",
                    default=True,
                    tooltip=_UNUSED + "the node itself shows what ran.",
                ),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: object, enable: bool = True, print_backend: bool = True) -> io.NodeOutput:
        if not enable:
            return io.NodeOutput(model)
        return add_rules(cls, model, Rule(("sage3",)), advisor=advice)


class PathchSageAttentionKJ(io.ComfyNode):
    """SageAttention by the names of KJNodes; the id is spelled as it is there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="PathchSageAttentionKJ",
            display_name="Patch Sage Attention KJ (use Attention Selector)",
            category=CATEGORY,
            description="Stands in for the KJNodes node of the same name, which is not installed.",
            is_deprecated=True,
            inputs=[
                model_inputs(),
                widget(
                    io.Combo,
                    "sage_attention",
                    options=_SAGE_VALUES,
                    default=DISABLED,
                    tooltip="disabled: the model passes through untouched. auto: the best SageAttention here. A model "
                    "in float32 keeps its own attention instead of being cut to 16 bits.",
                ),
                widget(
                    io.Boolean,
                    "allow_compile",
                    default=False,
                    optional=True,
                    tooltip=_UNUSED + "torch.compile always works.",
                ),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, sage_attention: str | bool | None = None) -> bool | str:
        return kernel_error(sage_attention) or True

    @classmethod
    def execute(
        cls, model: object, sage_attention: str | bool = DISABLED, allow_compile: bool = False
    ) -> io.NodeOutput:
        if sage_attention in (DISABLED, False):
            return io.NodeOutput(model)
        name = "sage" if sage_attention == "auto" else ALIASES.get(str(sage_attention), str(sage_attention))
        return add_rules(cls, model, Rule((name,)))


class DeleteModelPassthrough(io.ComfyNode):
    """What ReleaseModel does, with the inputs of ComfyUI_DeleteModelPassthrough."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="DeleteModelPassthrough",
            display_name="Delete Model Passthrough (use Release Model)",
            category=CATEGORY,
            description="Stands in for the node of the same name. Unloads the model; it stays usable.",
            is_deprecated=True,
            inputs=[
                io.AnyType.Input("data", tooltip="Passed through."),
                io.AnyType.Input("model", tooltip="A model, a CLIP or a VAE: unloaded."),
            ],
            outputs=[io.AnyType.Output(display_name="output", tooltip="What came in at 'data'.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, data: object, model: object) -> io.NodeOutput:
        say_on_node(release(model))
        return io.NodeOutput(data)


class PatchFlashAttentionKJ(io.ComfyNode):
    """FlashAttention by the name of KJNodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="PatchFlashAttentionKJ",
            display_name="Patch Flash Attention KJ (use Attention Selector)",
            category=CATEGORY,
            description="Stands in for the KJNodes node of the same name, which is not installed.",
            is_deprecated=True,
            inputs=[
                model_inputs(),
                widget(
                    io.Boolean,
                    "allow_compile",
                    default=False,
                    optional=True,
                    tooltip=_UNUSED + "torch.compile always works.",
                ),
            ],
            outputs=model_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: object, allow_compile: bool = False) -> io.NodeOutput:
        return add_rules(cls, model, Rule(("flash",)))
