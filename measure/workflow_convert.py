"""What the front end saves, made into what it would send to the server.

The server takes only the API format and resolves neither bypassed nodes nor subgraphs: the front end does. This does
the same on the file (ExecutableNodeDTO and graphToPrompt in ComfyUI_frontend 1.47), with the order of the widgets from
the server's /object_info. What it cannot do rightly it refuses, and says how to export the workflow instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .workflow_file import EXPORT, Prompt, WorkflowError
from .workflow_widgets import WidgetError, named_values, sent_inputs

_NEVER, _BYPASSED = 2, 4  # modes of a node
_OUTER = "-10"  # the node inside a subgraph that stands for its inputs
_VIRTUAL = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode", "GetNode", "SetNode"}  # only in the front end


@dataclass(frozen=True)
class _Value:
    """A link that ends at a value in place of a node: that of a PrimitiveNode, or one that a subgraph shows outside."""

    value: Any


@dataclass
class _Graph:
    """The workflow, or one use of a subgraph: `node` of `outer`, made after `definition`."""

    prefix: str
    nodes: dict[str, dict[str, Any]]
    links: dict[Any, tuple[str, int]]  # id -> node and slot that it comes from
    definition: Mapping[str, Any] = field(default_factory=dict)
    outer: _Graph | None = None
    node: Mapping[str, Any] = field(default_factory=dict)


def _make(data: Mapping[str, Any], **about: Any) -> _Graph:
    links = {}
    for link in data.get("links") or []:
        if isinstance(link, dict):
            links[link["id"]] = (str(link["origin_id"]), int(link["origin_slot"]))
        elif link:
            links[link[0]] = (str(link[1]), int(link[2]))
    return _Graph(nodes={str(node["id"]): node for node in data.get("nodes") or []}, links=links, **about)


def _fits(one: object, other: object) -> bool:
    """May an output of one type go into an input of the other?"""
    if one in ("*", "", 0) or other in ("*", "", 0):
        return True
    return bool(set(str(one).lower().split(",")) & set(str(other).lower().split(",")))


class _Converter:
    def __init__(self, workflow: Mapping[str, Any], info: Mapping[str, Any], switch_on: Sequence[str]) -> None:
        self.info, self.switch_on = info, switch_on
        self.subgraphs = {one["id"]: one for one in (workflow.get("definitions") or {}).get("subgraphs") or []}
        self.inner: dict[str, _Graph] = {}  # by the path of the node that uses the subgraph
        self.top = _make(workflow, prefix="")

    def inside(self, graph: _Graph, node: Mapping[str, Any]) -> _Graph:
        path = f"{graph.prefix}{node['id']}:"
        if path.count(":") > 30:
            raise WorkflowError("the workflow has a subgraph that holds itself")
        if path not in self.inner:
            definition = self.subgraphs[node["type"]]
            self.inner[path] = _make(definition, prefix=path, definition=definition, outer=graph, node=node)
        return self.inner[path]

    def mode(self, node: Mapping[str, Any]) -> int:
        mode = int(node.get("mode") or 0)
        return 0 if mode == _BYPASSED and node["type"] in self.switch_on else mode

    def source(self, graph: _Graph, link: Any, wanted: object, depth: int = 0) -> list[Any] | _Value | None:
        """What a link brings: [node id, slot], a value, or None where nothing does."""
        if depth > 500:
            raise WorkflowError("the workflow's links run in a circle")
        if link not in graph.links:
            return None
        origin, slot = graph.links[link]
        if origin == _OUTER and graph.outer is not None:
            return self._from_outside(graph, graph.outer, slot, wanted, depth)
        node = graph.nodes.get(origin)
        if node is None or self.mode(node) == _NEVER:
            return None
        inputs = node.get("inputs") or []
        if self.mode(node) == _BYPASSED:
            passed = self._passed(node, slot, wanted)
            return None if passed is None else self.source(graph, inputs[passed].get("link"), wanted, depth + 1)
        if node["type"] in self.subgraphs:
            inner = self.inside(graph, node)
            ends = inner.definition["outputs"][slot].get("linkIds") or [None]
            return self.source(inner, ends[0], wanted, depth + 1)
        if node["type"] == "Reroute":
            return self.source(graph, inputs[0].get("link") if inputs else None, wanted, depth + 1)
        if node["type"] == "PrimitiveNode":
            return _Value((node.get("widgets_values") or [None])[0])
        if node["type"] in ("GetNode", "SetNode"):
            return self._shared(graph, node, wanted, depth)
        return None if node["type"] in _VIRTUAL else [f"{graph.prefix}{origin}", slot]

    def _from_outside(
        self, graph: _Graph, outer: _Graph, slot: int, wanted: object, depth: int
    ) -> list[Any] | _Value | None:
        """A link from a subgraph's own input."""
        name = graph.definition["inputs"][slot]["name"]
        for one in graph.node.get("inputs") or []:
            if one["name"] == name and one.get("link") in outer.links:
                return self.source(outer, one["link"], wanted, depth + 1)
        values = graph.node.get("widgets_values")
        shown = [number for number, _ in enumerate(graph.definition["inputs"]) if self._is_widget(graph, number)]
        if slot in shown and isinstance(values, list) and shown.index(slot) < len(values):
            # A subgraph's own box shows this value; where the box is inside another one, that one may show it too.
            return _Value(values[shown.index(slot)])
        return None

    def _is_widget(self, graph: _Graph, slot: int) -> bool:
        """Does the subgraph's box show a widget for this input: does it lead to one inside?"""
        for node in graph.nodes.values():
            for one in node.get("inputs") or []:
                if graph.links.get(one.get("link")) == (_OUTER, slot) and one.get("widget"):
                    return True
        return False

    @staticmethod
    def _passed(node: Mapping[str, Any], slot: int, wanted: object) -> int | None:
        """Which input goes through a bypassed node to an output."""
        inputs = node.get("inputs") or []
        output = node["outputs"][slot]["type"]
        if wanted in ("*", ""):
            return slot if slot < len(inputs) else 0 if inputs else None
        fitting = [
            number for number, one in enumerate(inputs) if _fits(one["type"], output) and _fits(one["type"], wanted)
        ]
        if slot in fitting:
            return slot
        exact = [number for number, one in enumerate(inputs) if one["type"] == wanted]
        return next(iter([*exact, *fitting]), None)

    def _shared(self, graph: _Graph, node: Mapping[str, Any], wanted: object, depth: int) -> list[Any] | _Value | None:
        """GetNode and SetNode of KJNodes: a value by name."""
        name = (node.get("widgets_values") or [None])[0]
        for one in graph.nodes.values():
            if one["type"] == "SetNode" and (one.get("widgets_values") or [None])[0] == name and one.get("inputs"):
                return self.source(graph, one["inputs"][0].get("link"), wanted, depth + 1)
        raise WorkflowError(f"{_name(node)} asks for {name!r}, which no SetNode of its graph holds; {EXPORT}")

    def active(self, graph: _Graph) -> Iterator[tuple[_Graph, dict[str, Any]]]:
        """The nodes that are sent, those of subgraphs included."""
        for node in graph.nodes.values():
            if self.mode(node) in (_NEVER, _BYPASSED) or node["type"] in _VIRTUAL:
                continue
            if node["type"] in self.subgraphs:
                yield from self.active(self.inside(graph, node))
            else:
                yield graph, node

    def node(self, graph: _Graph, node: Mapping[str, Any]) -> dict[str, Any]:
        schema = self.info[node["type"]]
        linked: dict[str, Any] = {}
        for one in node.get("inputs") or []:
            found = self.source(graph, one.get("link"), one["type"]) if one.get("link") is not None else None
            if found is not None:
                linked[one["name"]] = _sent(found.value) if isinstance(found, _Value) else found
        try:
            values = named_values(schema, node.get("widgets_values"))
        except WidgetError as error:
            raise WorkflowError(f"{_name(node)} cannot be read: {error}; {EXPORT}") from None
        inputs = sent_inputs(node["type"], {name: _sent(value) for name, value in values.items()} | linked)
        title = node.get("title") or schema.get("display_name") or node["type"]
        return {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}


def _sent(value: Any) -> Any:
    return {"__value__": value} if isinstance(value, list) else value  # a bare list would be taken for a link


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['id']} ({node.get('title') or node['type']})"


def to_api(workflow: Mapping[str, Any], info: Mapping[str, Any], switch_on: Sequence[str] = ()) -> Prompt:
    """The prompt that the front end would send for a saved workflow.

    info: the server's /object_info. Bypassed nodes whose class is in `switch_on` are taken as if they were not. Raises
    WorkflowError.
    """
    try:
        converter = _Converter(workflow, info, switch_on)
        for graph in (workflow, *converter.subgraphs.values()):
            for node in graph["nodes"]:
                if str(node["type"]).startswith(("workflow>", "workflow/")):
                    raise WorkflowError(f"{_name(node)} is a group node of older versions; {EXPORT}")
        active = list(converter.active(converter.top))
        if unknown := sorted({f"{node['type']} (node {node['id']})" for _, node in active if node["type"] not in info}):
            raise WorkflowError(
                f"the server does not know {', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}: install the "
                "packs that have these nodes, restart ComfyUI, and try again"
            )
        prompt = {f"{graph.prefix}{node['id']}": converter.node(graph, node) for graph, node in active}
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, RecursionError) as error:
        if isinstance(error, WorkflowError):
            raise
        raise WorkflowError(f"the workflow is damaged ({type(error).__name__}: {error}); {EXPORT}") from None
    for node in prompt.values():  # links to what is not sent
        node["inputs"] = {
            name: value for name, value in node["inputs"].items() if not isinstance(value, list) or value[0] in prompt
        }
    return prompt
