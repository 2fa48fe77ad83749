"""Which nodes are about attention, and what they look like in files."""

from __future__ import annotations

from typing import Any

from ..attention.policy import ERROR_BUDGET

SELECTOR, SWITCH = "AttentionSelector", "Sage3Switch"
# Nodes of this pack that take a model and give it on. AttentionCapture chooses no kernel.
OWN = (SELECTOR, "AttentionRule", "SDPAForce", SWITCH, "AttentionCapture")
# Others' nodes that choose a kernel for the model that goes through them.
OTHERS = ("Sage3AttentionOnlySwitch", "PathchSageAttentionKJ", "PatchFlashAttentionKJ", "ModelAttentionBackend")
# Nodes of this pack that are not about one model's attention: `remove` leaves them, and says so.
BESIDE = ("AttentionDoctor", "AttentionReport", "AttentionBenchmark", "ReleaseModel")
ATTENTION = (*OWN, *OTHERS)
CHOOSERS = tuple(name for name in ATTENTION if name != "AttentionCapture")

# Take a model, and give something that would look as if they sampled with it.
NOT_SAMPLERS = (
    "AddNoise",
    "TrainLoraNode",
    "AttentionReport",
    "AttentionBenchmark",
    "ReleaseModel",
    "DeleteModelPassthrough",
)
# A node that gives nothing but these does not sample with the model that it takes.
PASSIVE = {
    "SIGMAS", "SAMPLER", "CONDITIONING", "CONTROL_NET", "INT", "FLOAT", "STRING", "BOOLEAN", "MASK", "BOUNDING_BOX",
    "SAM3_TRACK_DATA", "IC_LORA_PARAMETERS",
}  # fmt: skip
# SageAttention by the names of KJNodes (nodes/schema.py has the same for the nodes themselves).
KERNELS = {
    "auto": "sage",
    "sageattn_qk_int8_pv_fp16_cuda": "sage2_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton": "sage2_fp16_triton",
    "sageattn_qk_int8_pv_fp8_cuda": "sage2_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda++": "sage2_fp8_cuda_pp",
    "sageattn3": "sage3",
    "sageattn3_per_block_mean": "sage3_per_block_mean",
}
GGUF_KERNELS = {"sdpa": "sdpa", "sageattn": "sage", "xformers": "xformers", "flashattn": "flash"}

# (input, its type in files, its value) in the order of the widgets; an optional one has the shape of a ring there.
_WIDGETS: dict[str, tuple[tuple[str, str, Any], ...]] = {
    SELECTOR: (
        ("kernel", "COMBO", "auto"),
        ("precision", "COMBO", "exact"),
        ("when_unavailable", "COMBO", "fallback"),
        ("cross_attention", "COMBO", "same"),
        ("min_tokens", "INT", 0),
        ("error_budget", "FLOAT", ERROR_BUDGET),
        ("time_calls", "BOOLEAN", False),
    ),
    SWITCH: (
        ("enable", "BOOLEAN", True),
        ("per_block_mean", "BOOLEAN", False),
        ("dense_first_percent", "FLOAT", 0),
        ("dense_last_percent", "FLOAT", 0),
        ("dense_first_blocks", "INT", 0),
        ("dense_last_blocks", "INT", 0),
        ("preset", "COMBO", "custom"),
    ),
}
# The order of a node's widgets: a picture's or video's workflow does not list the inputs of those without a link.
ORDERS = {kind: tuple(name for name, _, _ in widgets) for kind, widgets in _WIDGETS.items()}
ORDERS["PathchSageAttentionKJ"] = ("sage_attention", "allow_compile")
_OPTIONAL = ("error_budget", "time_calls", "preset")
SIZES = {SELECTOR: [390, 154], SWITCH: [390, 178]}
TITLES = {SELECTOR: "Attention Selector", SWITCH: "Sage3 Switch"}


def values(kind: str, **wanted: Any) -> dict[str, Any]:
    """The widgets of a new node by name, with those values that are wanted."""
    return {name: wanted.get(name, value) for name, _, value in _WIDGETS[kind]}


def saved_inputs(kind: str) -> list[dict[str, Any]]:
    """The inputs of a new node as the front end saves them, none of them linked."""
    found: list[dict[str, Any]] = [{"localized_name": "model", "name": "model", "type": "MODEL", "link": None}]
    for name, of_type, _ in _WIDGETS[kind]:
        shape = {"shape": 7} if name in _OPTIONAL else {}
        found.append(
            {"localized_name": name, "name": name, **shape, "type": of_type, "widget": {"name": name}, "link": None}
        )
    return found


def properties(kind: str) -> dict[str, Any]:
    return {"Node name for S&R": kind, "cnr_id": "comfyui-attune"}


def saved_node(kind: str, **wanted: Any) -> dict[str, Any]:
    """A new node as the front end saves it, without id, place, order and links."""
    return {
        "id": 0,
        "type": kind,
        "pos": [0, 0],
        "size": list(SIZES[kind]),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": saved_inputs(kind),
        "outputs": [{"localized_name": "model", "name": "model", "type": "MODEL", "links": []}],
        "properties": properties(kind),
        "widgets_values": list(values(kind, **wanted).values()),
    }


def sent_node(kind: str, model: Any, **wanted: Any) -> dict[str, Any]:
    """A new node in API format."""
    return {"inputs": {"model": model, **values(kind, **wanted)}, "class_type": kind, "_meta": {"title": TITLES[kind]}}
