"""A workflow in API format as the same graph as a saved one, and what was changed there written back.

Links have no types in this format: what goes into an input called `model` is taken for a model, and what an output is
follows from the inputs that it feeds.
"""

from __future__ import annotations

import re
from typing import Any

from .book import Book
from .kinds import TITLES, sent_node

_MODEL = re.compile(r"(model|unet)(_?\d+|_a|_b|_positive|_negative)?")
# Inputs that say what an output is, of the nodes that a sampler or a scheduler feeds.
_TYPES = {
    "sigmas": "SIGMAS", "sampler": "SAMPLER", "guider": "GUIDER", "positive": "CONDITIONING",
    "negative": "CONDITIONING", "conditioning": "CONDITIONING", "samples": "LATENT", "latent": "LATENT",
    "latent_image": "LATENT", "control_net": "CONTROL_NET", "mask": "MASK",
}  # fmt: skip
_SWITCHES = re.compile(r"on_(true|false)|any_?\d*|input_?\d*|value_?\d*")
# Their `model` is of a type of their own.
_FOREIGN = re.compile(r"(WanVideo|HyVideo|CogVideo|Mochi|FramePack).*Sampler.*")

Prompt = dict[str, dict[str, Any]]


def _is_link(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        and isinstance(value[1], int) and 0 <= value[1] < 1000
    )  # fmt: skip


def _type_of(node: dict[str, Any], name: str) -> str:
    if _MODEL.fullmatch(name):
        return "*" if _FOREIGN.fullmatch(node["class_type"]) else "MODEL"
    return _TYPES.get(name, "*")


def _types(prompt: Prompt) -> dict[tuple[str, int], str]:
    """What comes out of each output that is used: "MODEL", …; "*" where nothing tells."""
    found: dict[tuple[str, int], str] = {}
    linked = [
        (key, name, (value[0], value[1]))
        for key, node in prompt.items()
        for name, value in node["inputs"].items()
        if _is_link(value)
    ]
    for key, name, pin in linked:
        if found.get(pin, "*") == "*":
            found[pin] = _type_of(prompt[key], name)
    for _ in range(20):  # switches behind switches
        before = dict(found)
        for key, name, pin in linked:
            if _SWITCHES.fullmatch(name) and found.get((key, 0)) == "MODEL" and found[pin] == "*":
                found[pin] = "MODEL"
        if found == before:
            break
    return found


class ApiBook(Book):
    """The graph of a prompt. `write_back` brings what was changed in it into the prompt."""

    has_modes = False

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        types = _types(prompt)
        nodes: dict[str, dict[str, Any]] = {}
        links: list[list[Any]] = []
        for key, node in prompt.items():
            inputs = []
            for slot, (name, value) in enumerate(node["inputs"].items()):
                if _is_link(value):
                    kind = types[(value[0], value[1])]
                    links.append([len(links) + 1, value[0], value[1], key, slot, kind])
                    inputs.append({"name": name, "type": kind, "link": len(links)})
            plain = {name: value for name, value in node["inputs"].items() if not _is_link(value)}
            meta = node.get("_meta")
            title = meta.get("title") if isinstance(meta, dict) else ""
            nodes[key] = {
                "id": key,
                "type": node["class_type"],
                "title": title if isinstance(title, str) else "",
                "inputs": inputs,
                "outputs": [],
                "widgets_values": plain,
            }
        for number, origin, slot, *_, kind in links:
            outputs = nodes.get(origin, {}).get("outputs", [])
            outputs += [{"type": "*", "links": []} for _ in range(slot + 1 - len(outputs))]
            outputs[slot : slot + 1] = [{"type": kind, "links": [*outputs[slot]["links"], number]}]
        super().__init__({"nodes": list(nodes.values()), "links": links})

    def write_back(self) -> None:
        """Bring the graph's nodes and links into the prompt; what did not change there is left as it is."""
        graph = self.root
        for key in [key for key in self.prompt if key not in graph.nodes]:
            del self.prompt[key]
        for key, node in graph.nodes.items():
            kind = node["type"]
            if key not in self.prompt:
                self.prompt[key] = sent_node(kind, None)
            if self.prompt[key]["class_type"] != kind:
                about = self.prompt[key].get("_meta")
                meta = (about if isinstance(about, dict) else {}) | {"title": TITLES[kind]}
                self.prompt[key].update({"inputs": {"model": None}, "class_type": kind, "_meta": meta})
            inputs = self.prompt[key]["inputs"]
            plain = node["widgets_values"]
            if isinstance(plain, list):
                plain = dict(zip([one["name"] for one in node["inputs"] if "widget" in one], plain, strict=True))
            for name, value in plain.items():
                if name not in inputs or inputs[name] is not value:
                    inputs[name] = value
            wanted = {one["name"]: graph.links[one["link"]].origin for one in node["inputs"] if one["link"] is not None}
            for name in [name for name, value in inputs.items() if _is_link(value) and name not in wanted]:
                del inputs[name]  # what fed it is gone
            if inputs.get("model", "") is None and "model" not in wanted:
                del inputs["model"]
            for name, pin in wanted.items():
                if inputs.get(name) != list(pin):
                    inputs[name] = list(pin)
