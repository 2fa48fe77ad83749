"""Why a ComfyUI does not take a prompt, in words: which node, which input, wanted, found, what to do.

What the server answers is in validate_prompt and validate_inputs of its execution.py; older versions tell less.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .workflow_file import Prompt

_FILE = re.compile(r".*\.(safetensors|sft|ckpt|pth?|bin|gguf|onnx|latent|png|jpe?g|webp|mp4|webm|wav|mp3|flac)", re.I)
_MOST = 5  # choices that are named
_LONG = 400


def _short(value: object, most: int = 80) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = repr(text) if isinstance(value, str) else text
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _choices(config: Any) -> list[Any]:
    """The values that an input takes, as the server lists them: none where it has too many to list."""
    if not (isinstance(config, list) and config):
        return []
    listed = config[0] if isinstance(config[0], list) else config[1:] and config[1].get("options")
    return list(listed or [])


def _not_in_list(found: Any, extra: Mapping[str, Any], details: str) -> str:
    choices = _choices(extra.get("input_config"))
    named = ", ".join(_short(one) for one in choices[:_MOST])
    more = f" or {len(choices) - _MOST} others" if len(choices) > _MOST else ""
    many = re.search(r"list of length (\d+)", details)
    wanted = f"{named}{more}" if named else f"one of the {many[1]} that it has" if many else "one of those it has: none"
    if isinstance(found, str) and _FILE.fullmatch(found):
        cure = "put that file into the folder of ComfyUI that this node reads, or choose another in the workflow"
    else:
        cure = "choose another in the workflow"
    return f"found {_short(found)}, wanted {wanted}: {cure}"


def _number(error: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    config = extra.get("input_config")
    limits = config[1] if isinstance(config, list) and len(config) > 1 and isinstance(config[1], dict) else {}
    bounds = [f"at {word} {limits[name]}" for name, word in (("min", "least"), ("max", "most")) if name in limits]
    kind = str(config[0]) if isinstance(config, list) and config and isinstance(config[0], str) else ""
    wanted = " ".join(part for part in (kind, " and ".join(bounds)) if part) or str(error.get("message"))
    return f"found {_short(extra.get('received_value'))}, wanted {wanted}: change it in the workflow"


def _bad_links(node: Mapping[str, Any], prompt: Prompt) -> str:
    links = {name: one for name, one in node.get("inputs", {}).items() if isinstance(one, list) and len(one) == 2}
    lost = {name: one for name, one in links.items() if str(one[0]) not in prompt} or links
    said = ", ".join(f"{name} from output {one[1]} of node {one[0]}" for name, one in list(lost.items())[:_MOST])
    return f"found a link to a node or an output that is not there ({said}), wanted one that is: link it anew"


def _one(error: Mapping[str, Any], node: Mapping[str, Any], prompt: Prompt) -> str:
    """One error of a node."""
    extra = error.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    kind, details = error.get("type"), str(error.get("details") or "")
    name = extra.get("input_name")
    at = f"input {name}: " if name else ""
    if kind == "value_not_in_list":
        return at + _not_in_list(extra.get("received_value"), extra, details)
    if kind == "required_input_missing":
        return f"{at}found nothing, wanted a value or a link: give it one in the workflow"
    if kind in ("value_smaller_than_min", "value_bigger_than_max", "invalid_input_type"):
        return at + _number(error, extra)
    if kind == "return_type_mismatch":
        config = extra.get("input_config")
        wanted = _short(config[0]).strip("'") if isinstance(config, list) and config else "another type"
        origin = str((extra.get("linked_node") or ["?"])[0])
        comes = f"{prompt.get(origin, {}).get('class_type', 'a node')} (node {origin})"
        return f"{at}found {extra.get('received_type')} from {comes}, wanted {wanted}: link another output to it"
    if kind in ("exception_during_inner_validation", "exception_during_validation") and (
        extra.get("exception_type") in ("KeyError", "IndexError", "TypeError")
    ):
        return _bad_links(node, prompt)
    if kind == "custom_validation_failed":
        found = node.get("inputs", {}).get(name)
        said = details.removeprefix(str(name)).lstrip(" -") or "it does not take this value"
        file = (
            "; a file must lie in ComfyUI's input folder" if isinstance(found, str) and _FILE.fullmatch(found) else ""
        )
        return f"{at}found {_short(found)}, and the node says: {said[:_LONG]}: change it in the workflow{file}"
    if kind == "dependency_cycle":
        return f"found links that run in a circle ({details[:_LONG]}), wanted links that run one way: take one out"
    return f"{error.get('message')}: {details}"[:_LONG]


def _whole(error: Any, prompt: Prompt, answer: str) -> str:
    """What is wrong with the prompt as a whole."""
    if not isinstance(error, dict):
        return str(error or answer)[:_LONG] or "it does not say why"
    extra = error.get("extra_info") if isinstance(error.get("extra_info"), dict) else {}
    if error.get("type") == "prompt_no_outputs":
        return (
            "found no node that saves or shows anything, wanted one, as SaveImage or PreviewImage: add it, or enable "
            "it where it is bypassed"
        )
    if error.get("type") == "missing_node_type":
        node = str(extra.get("node_id"))
        kind = extra.get("class_type") or prompt.get(node, {}).get("class_type") or "a node without a class_type"
        return (
            f"{kind} (node {node}): found no node of that name, wanted one that the server has: install the pack that "
            "has it, restart ComfyUI, and try again"
        )
    said = [str(part) for part in (error.get("message"), error.get("details")) if part]
    return ": ".join(said)[:_LONG] or answer[:_LONG]


def why_rejected(answer: Any, prompt: Prompt) -> str:
    """The server's first reason, and how many there are besides.

    answer: what it answered to POST /prompt, as bytes or as what its JSON says; whatever it is, there is a text.
    """
    text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else ""
    try:
        data = json.loads(text) if isinstance(answer, bytes) else answer
        found = [
            f"{prompt.get(node, {}).get('class_type') or told.get('class_type') or '?'} (node {node}): "
            f"{_one(error, prompt.get(node, {}), prompt)}"
            for node, told in (data.get("node_errors") or {}).items()
            for error in told.get("errors") or []
        ]
        if not found:
            return _whole(data.get("error"), prompt, text)
        others = f"; and {len(found) - 1} more like this" if len(found) > 1 else ""
        return f"{found[0]}{others}"
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
        return " ".join(re.sub(r"<[^>]*>", " ", text).split())[:_LONG] or "it does not say why"
