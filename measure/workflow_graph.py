"""Prepares an API prompt for measuring: which kernel, how many frames, what is compared. The file is never changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .workflow_file import Prompt, WorkflowError
from .workflow_widgets import inputs_of, options_of, type_of

SELECTOR = "AttentionSelector"
_SETTINGS = {"precision": "exact", "when_unavailable": "fallback", "cross_attention": "same", "min_tokens": 0}
# Nodes that say something else about attention, and would win over the kernel that is to be measured, or take time.
_OTHERS = (
    "AttentionRule", "AttentionCapture", "SDPAForce", "Sage3Switch", "Sage3AttentionOnlySwitch",
    "PathchSageAttentionKJ", "PatchFlashAttentionKJ", "ModelAttentionBackend",
)  # fmt: skip
_LENGTHS = ("length", "num_frames", "video_frames", "frames")
_PICTURES = ("SaveImage", "PreviewImage")  # what they write is PNG: nothing is lost
_MEDIA = {"LATENT", "IMAGE", "VIDEO", "AUDIO", "MASK"}
_AGAIN = "attune_run"  # an input that no node has: nodes do not get it, the host's cache takes it for a change


@dataclass(frozen=True)
class Job:
    """A prompt that is ready to be measured.

    `sizes`: nodes that say how large the picture is, and the name of their input for frames, "" where they have none.
    `selectors`: the nodes that set the kernel. `stages`: nodes whose time is told, with their titles. `taps`: nodes
    that write the pictures that are compared; `added` are those of them that are not in the workflow. `notes` say what
    is otherwise than in the file.
    """

    prompt: Prompt
    info: Mapping[str, Any]
    sizes: dict[str, str]
    selectors: list[str]
    stages: dict[str, str]
    taps: list[str]
    added: list[str]
    notes: list[str] = field(default_factory=list)

    def variant(self, kernel: str, frames: int | None, run: str, size: tuple[int, int] | None = None) -> Prompt:
        """The prompt of one run with this kernel. `run`: a text that no run had before, so that no cache knows it.

        frames, size (width, height): None leaves what the workflow says.
        """
        prompt = copy.deepcopy(self.prompt)
        for node in self.selectors:
            inputs = prompt[node]["inputs"]
            prompt[node]["inputs"] = {"model": inputs["model"], "kernel": kernel, **_SETTINGS, _AGAIN: run}
        for node, length in self.sizes.items():
            prompt[node]["inputs"][_AGAIN] = run
            if length and frames is not None:
                _put(prompt, node, length, frames)
            if size is not None:
                inputs = prompt[node]["inputs"]
                if _is_link(inputs.get("width")) and inputs["width"] == inputs.get("height"):
                    inputs.update(width=size[0], height=size[1])  # one number for both stands elsewhere
                _put(prompt, node, "width", size[0])
                _put(prompt, node, "height", size[1])
        return prompt

    def said(self, name: str) -> int | None:
        """What the workflow says itself: "frames", "width" or "height"; None where a node works it out."""
        for node, length in self.sizes.items():
            value = _number(self.prompt, node, length if name == "frames" else name)
            if value is not None:
                return value
        return None

    def check_frames(self, frames: int) -> None:
        """Raises WorkflowError where a node would round this number, or cannot take it."""
        lengths = {node: length for node, length in self.sizes.items() if length}
        if not lengths:
            raise WorkflowError(
                "--frames: no node of the workflow makes a number of frames (one with whole numbers width, height and "
                f"{' or '.join(_LENGTHS)}); leave --frames away to run it as it is"
            )
        for node, length in lengths.items():
            class_type = self.prompt[node]["class_type"]
            options = options_of(inputs_of(self.info[class_type])[length])
            least, most, step = (options.get(name) for name in ("min", "max", "step"))
            least, step = int(least if least is not None else 1), int(step or 1)
            what = f"--frames {frames}: {class_type} (node {node}) takes {least}, {least + step}, {least + 2 * step}, …"
            if (most is not None and frames > most) or frames < least:
                raise WorkflowError(f"{what}{f' up to {most}' if most is not None else ''}")
            if (frames - least) % step:
                below = frames - (frames - least) % step
                raise WorkflowError(f"{what} and would round this number: give {below} or {below + step}")


def _put(prompt: Prompt, node: str, name: str, value: int) -> None:
    """Set a number where it stands: in the node, or in the primitive node that it is taken from."""
    link = prompt[node]["inputs"].get(name)
    if _is_link(link) and isinstance(prompt.get(link[0], {}).get("inputs", {}).get("value"), int):
        node, name = link[0], "value"
    prompt[node]["inputs"][name] = value


def _number(prompt: Prompt, node: str, name: str) -> int | None:
    value = prompt[node]["inputs"].get(name)
    if _is_link(value):
        value = prompt.get(value[0], {}).get("inputs", {}).get("value")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


class _Graph:
    def __init__(self, prompt: Prompt, info: Mapping[str, Any]) -> None:
        self.prompt, self.info = prompt, info

    def links(self, node: str, kind: str) -> Iterator[tuple[str, list[Any]]]:
        """The linked inputs of a type: (name, link)."""
        declared = inputs_of(self.schema(node))
        for name, value in self.prompt[node]["inputs"].items():
            if _is_link(value) and name in declared and kind in type_of(declared[name]).split(","):
                yield name, value

    def schema(self, node: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.info[self.prompt[node]["class_type"]]
        return found

    def outputs(self, node: str) -> set[str]:
        return {str(kind) for kind in self.schema(node).get("output") or []}

    def after(self, nodes: list[str]) -> set[str]:
        """The nodes that need one of `nodes`, and `nodes` themselves."""
        found = set(nodes)
        while True:
            more = {
                node
                for node, data in self.prompt.items()
                if node not in found and any(_is_link(value) and value[0] in found for value in data["inputs"].values())
            }
            if not more:
                return found
            found |= more

    def take_out(self, classes: tuple[str, ...], benchmark: str) -> list[str]:
        """Take nodes with a model in and out of the prompt, as if bypassed, and benchmarks with all after them.

        Tells which.
        """
        benchmarks = [node for node, data in self.prompt.items() if data["class_type"] == benchmark]
        for node in self.after(benchmarks):
            del self.prompt[node]
        gone = [node for node, data in self.prompt.items() if data["class_type"] in classes]
        for node in gone:
            model = self.prompt.pop(node)["inputs"].get("model")
            for data in self.prompt.values():
                inputs = data["inputs"]
                inputs.update({name: model for name, value in inputs.items() if _is_link(value) and value[0] == node})
        return gone + benchmarks

    def add(self, class_type: str, **inputs: Any) -> str:
        number = next(number for number in range(1, 10_000) if f"attune{number}" not in self.prompt)
        self.prompt[f"attune{number}"] = {
            "class_type": class_type,
            "inputs": inputs,
            "_meta": {"title": "attune bench"},
        }
        return f"attune{number}"

    def has_selector(self, link: list[Any]) -> bool:
        """Does the model of this link come through a selector?"""
        seen: set[str] = set()
        while link[0] in self.prompt and link[0] not in seen:
            seen.add(link[0])
            if self.prompt[link[0]]["class_type"] == SELECTOR:
                return True
            models = [value for _, value in self.links(link[0], "MODEL")]
            if not models:
                return False
            link = models[0]
        return False

    def add_selectors(self) -> int:
        """Put a selector before everything that uses a model and has none on the way; tells how many."""
        added: dict[tuple[str, int], str] = {}
        used = [
            (node, name, link)
            for node in self.prompt
            if "MODEL" not in self.outputs(node) or self.outputs(node) & _MEDIA
            for name, link in self.links(node, "MODEL")
        ]
        if not used:
            raise WorkflowError(
                "no node of the workflow takes a model of ComfyUI's own (type MODEL): models of other kinds, as "
                "WanVideoWrapper's, and those in pipes are not reached by this pack"
            )
        for node, name, link in used:
            if not self.has_selector(link):
                place = (link[0], link[1])
                if place not in added:
                    added[place] = self.add(SELECTOR, model=link)
                self.prompt[node]["inputs"][name] = [added[place], 0]
        return len(added)

    def add_taps(self) -> tuple[list[str], list[str]]:
        """(nodes that write the sampled pictures without loss, those of them that had to be added)."""
        sampled = self.after([node for node, data in self.prompt.items() if data["class_type"] == SELECTOR])
        taps, added = [], {}
        for node in [node for node in self.prompt if node in sampled]:
            if self.prompt[node]["class_type"] in _PICTURES:
                taps.append(node)
            elif self.schema(node).get("output_node") or "VIDEO" in self.outputs(node):
                for _, link in self.links(node, "IMAGE"):
                    if link[0] in sampled and (link[0], link[1]) not in added:
                        added[(link[0], link[1])] = self.add("PreviewImage", images=link)
        return taps + list(added.values()), list(added.values())

    def sizes(self) -> dict[str, str]:
        found = {}
        for node in self.prompt:
            declared = {name for name, spec in inputs_of(self.schema(node)).items() if type_of(spec) == "INT"}
            length = next((name for name in _LENGTHS if name in declared), "")
            if {"width", "height"} <= declared and (length or "LATENT" in self.outputs(node)):
                found[node] = length
        return found

    def stages(self, added: list[str]) -> dict[str, str]:
        """Nodes whose time says something: what makes or writes pictures, latents, sound."""
        return {
            node: str((data.get("_meta") or {}).get("title") or data["class_type"])
            for node, data in self.prompt.items()
            if node not in added and (self.outputs(node) & _MEDIA or self.schema(node).get("output_node"))
        }


def require_pack(info: Mapping[str, Any]) -> None:
    """Raises WorkflowError where the server has no ComfyUI-Attune. info: its /object_info."""
    if SELECTOR not in info:
        raise WorkflowError(
            "this ComfyUI has no ComfyUI-Attune: put the pack into its folder custom_nodes, restart it, and look at "
            "its log for a line with ComfyUI-Attune"
        )


def prepare(prompt: Prompt, info: Mapping[str, Any]) -> Job:
    """Make an API prompt ready. info: the server's /object_info. Raises WorkflowError."""
    require_pack(info)
    if unknown := sorted({data["class_type"] for data in prompt.values()} - set(info)):
        raise WorkflowError(f"the server does not know {', '.join(unknown)}: install the packs that have these nodes")
    graph = _Graph(copy.deepcopy(prompt), info)
    notes = []
    if gone := graph.take_out(_OTHERS, "AttentionBenchmark"):
        names = ", ".join(f"{prompt[node]['class_type']} ({node})" for node in gone)
        notes.append(f"left out, since it would decide over the kernel or take time: {names}")
    if count := graph.add_selectors():
        notes.append(f"put in before what samples: {count} AttentionSelector")
    taps, added = graph.add_taps()
    if not taps:
        notes.append("the workflow saves no pictures of what it samples: outputs are not compared")
    selectors = [node for node, data in graph.prompt.items() if data["class_type"] == SELECTOR]
    return Job(graph.prompt, info, graph.sizes(), selectors, graph.stages(added), taps, added, notes)
