"""Which value of a saved node belongs to which of its inputs: the file has the values in a row, without names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PLAIN = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_OF_FRONT_END = {"LOAD_3D", "LOAD_3D_ADVANCED", "PREVIEW_3D", "AUDIO_UI", "IMAGEUPLOAD", "AUDIOUPLOAD"}
_ROWS = "COMFY_DYNAMICGROUP_V3"
_AFTER = {"fixed", "increment", "decrement", "randomize"}  # what a seed does after a run: a value without an input
_VIEWERS = ("SaveGLB", "Preview3D")  # the front end puts a view of the model behind their inputs: it is not sent
_CUSTOM_COMBO = "CustomCombo"  # behind its choice: which one that is, and the options, all of them the front end's
_UPLOADS = ("image_upload", "video_upload", "audio_upload", "animated_image_upload", "file_upload")


class WidgetError(ValueError):
    """Values that do not fit to the inputs."""


def inputs_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Every declared input of a node in /object_info: name -> [type, options]; required ones first, in their order."""
    found: dict[str, Any] = {}
    for section in ("required", "optional"):
        declared = (schema.get("input") or {}).get(section) or {}
        order = (schema.get("input_order") or {}).get(section) or declared
        found.update({name: declared[name] for name in [*order, *declared] if name in declared})
    return found


def type_of(spec: Any) -> str:
    """The type that an input takes, as links have it: "MODEL"; "COMBO" for a list of choices."""
    kind = spec[0] if spec else ""
    return kind if isinstance(kind, str) else "COMBO"


def options_of(spec: Any) -> Mapping[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def _is_widget(spec: Any) -> bool:
    options = options_of(spec)
    if options.get("forceInput") or options.get("defaultInput"):
        return False
    kind = type_of(spec)
    if options.get("widgetType") or "socketless" in options:  # false: a widget that may be linked as well
        return True
    return kind in _PLAIN or kind in _OF_FRONT_END or _is_dynamic(kind) or kind == _ROWS


def _is_dynamic(kind: str) -> bool:
    """A choice that brings inputs of its own."""
    return kind.startswith("COMFY_") and "COMBO" in kind


def _chosen(name: str, spec: Any, value: Any) -> dict[str, Any]:
    """The inputs that a choice brings, with their full names."""
    for option in options_of(spec).get("options") or []:
        if option.get("key") == value:
            return {f"{name}.{inner}": one for inner, one in inputs_of({"input": option.get("inputs")}).items()}
    raise WidgetError(f"the server does not know the choice {value!r} of {name}")


def _default(spec: Any) -> Any:
    """What a new node's widget holds; None where only the front end knows."""
    options = options_of(spec)
    if "default" in options:
        return options["default"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options") or [None]
    return choices[0]["key"] if isinstance(choices[0], dict) else choices[0]


def named_values(schema: Mapping[str, Any], values: Any) -> dict[str, Any]:
    """Values by the names of the inputs, with the default where a newer node has an input that the file lacks.

    schema: the node in /object_info. values: `widgets_values` of the file. Raises WidgetError.
    """
    inputs = inputs_of(schema)
    if isinstance(values, dict):
        return {name: value for name, value in values.items() if name not in ("videopreview", "preview")}
    left = list(values or [])
    given = len(left)
    found: dict[str, Any] = {}

    def take(name: str, spec: Any) -> None:
        if not _is_widget(spec):
            return
        if type_of(spec) == _ROWS:
            raise WidgetError(f"its input {name} has rows of values")
        value = found[name] = left.pop(0) if left else _default(spec)
        if _is_dynamic(type_of(spec)):
            for inner, one in _chosen(name, spec, value).items():
                take(inner, one)
        follows = options_of(spec).get("control_after_generate")
        if follows is None:
            follows = type_of(spec) == "INT" and name in ("seed", "noise_seed")
        if follows and left and isinstance(left[0], str) and left[0] in _AFTER:
            left.pop(0)

    for name, spec in inputs.items():
        take(name, spec)
    if schema.get("name") in _VIEWERS:
        del left[:1]
    if schema.get("name") == _CUSTOM_COMBO:
        options = left[1:] if left and not isinstance(left[0], str) else left  # older front ends keep no index
        found |= {f"option{number}": option for number, option in enumerate(options, 1)}
        left = []
    uploads = any(options_of(spec).get(kind) for spec in inputs.values() for kind in _UPLOADS)
    if left and not uploads and any(map(_is_widget, inputs.values())):
        raise WidgetError(f"the file has {given} values for it, {len(left)} more than the server's version takes")
    return found


def sent_inputs(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` of a node of that class, with what the front end works out when it sends them."""
    if kind != _CUSTOM_COMBO or isinstance(inputs.get("choice"), list):
        return inputs
    options = [value for name, value in inputs.items() if name.startswith("option")]
    choice = inputs.get("choice")
    return {**inputs, "index": options.index(choice) if choice in options else -1}
