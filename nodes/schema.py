"""What every node of the pack shares: schemas that old hosts understand, option lists, and how a rule gets its name."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from comfy_api.latest import io

from ..attention.plan import RefusedError, refused_by_machine
from ..attention.policy import KERNEL_NAMES, BlockRangeError, Rule, parse_blocks
from ..host.attachment import Advisor
from ..host.comfyui import attach, count_blocks, switched_off
from ..host.process import kernels, machine, verdicts

CATEGORY = "attention"
MODEL_IN = "The model whose attention is routed. It is cloned; the model that comes in stays as it is."
MODEL_OUT = "The same model with this node's wish about attention added."
KERNELS = list(KERNEL_NAMES)

_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}

# Values that nodes of other packs hold, so that a workflow made with them loads and means the same here.
ALIASES: dict[str, str] = {
    "sageattn_qk_int8_pv_fp16_cuda": "sage2_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton": "sage2_fp16_triton",
    "sageattn_qk_int8_pv_fp8_cuda": "sage2_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda++": "sage2_fp8_cuda_pp",
    "sageattn3": "sage3",
    "sageattn3_per_block_mean": "sage3_per_block_mean",
}
DISABLED = "disabled"


def Schema(**fields: Any) -> io.Schema:
    """`io.Schema` without the fields that this host does not know: one of those would stop the whole pack."""
    # The host leaves the node's id out of the cache key of V3 nodes unless they ask for this: two nodes with the same
    # inputs would share one result, and what ran would be told of the wrong one. Caching itself stays.
    fields = {"not_idempotent": True, **fields}
    return io.Schema(**{name: value for name, value in fields.items() if name in _SCHEMA_FIELDS})


def widget(kind: Any, name: str, **options: Any) -> Any:
    """An input of `kind` (`io.Combo`, …) without the options that this host does not know."""
    known = inspect.signature(kind.Input.__init__).parameters
    return kind.Input(name, **{key: value for key, value in options.items() if key in known})


def any_type(name: str) -> tuple[Any, dict[str, Any]]:
    """The type of what is passed through, and its arguments: newer hosts give the output the type of the input."""
    if not hasattr(io, "MatchType"):
        return io.AnyType, {}
    return io.MatchType, {"template": io.MatchType.Template(name)}


def model_inputs() -> Any:
    return io.Model.Input("model", tooltip=MODEL_IN)


def model_outputs() -> list[Any]:
    return [io.Model.Output(display_name="model", tooltip=MODEL_OUT)]


def kernel_error(name: object, may_be_off: bool = True) -> str | None:
    """What is wrong with a kernel name, or None. Linked inputs are not known yet and come as None.

    `may_be_off` lets "disabled" (and False, an old default) pass, which nodes of other packs hold.
    """
    if name is None or (may_be_off and (name is False or name == DISABLED)):
        return None
    if isinstance(name, str) and (name in KERNEL_NAMES or name in ALIASES):
        return None
    return f"there is no attention kernel called {name!r}. The names are: {', '.join(KERNEL_NAMES)}."


def blocks_error(text: object) -> str | None:
    if text is None:
        return None
    try:
        parse_blocks(str(text))
    except BlockRangeError as error:
        return str(error)
    return None


def percent_error(start: float | None, end: float | None) -> str | None:
    if start is None or end is None or 0 <= start < end <= 100:
        return None
    return (
        f"from_percent {start:g} to to_percent {end:g} leaves nothing to do; "
        "wanted numbers from 0 to 100 with from_percent below to_percent."
    )


def add_rules(cls: Any, model: Any, *rules: Rule, advisor: Advisor | None = None) -> io.NodeOutput:
    """Put `rules` on a clone of `model` in the name of the node being executed, and return it as the node's output.

    Raises RefusedError, before any sampling, where a rule may not fall through and this machine can never follow it.
    """
    if switched_off():
        return io.NodeOutput(model)
    source = str(cls.hidden.unique_id or cls.define_schema().node_id)
    rules = tuple(dataclasses.replace(rule, source=source) for rule in rules)
    where = str(getattr(model, "load_device", machine().main_device.name))
    for rule in rules:
        if rule.on_refusal == "error":
            refused = refused_by_machine(rule.kernels, kernels(), machine(), where, verdicts().condemned(where))
            if refused:
                raise RefusedError(refused)
    return io.NodeOutput(attach(model, *rules, node_type=cls.define_schema().node_id, advisor=advisor))


def read_blocks(model: Any, text: str) -> Any:
    """The block range of widget `blocks` for this model; raises BlockRangeError that names widget and block count."""
    _, blocks = count_blocks(model)
    try:
        return parse_blocks(text, blocks)
    except BlockRangeError as error:
        raise BlockRangeError(f"blocks: {error}") from None
