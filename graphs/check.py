"""Is a saved workflow sound enough to be changed? What is wrong is told once, in words, before anything is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..measure.workflow_file import WorkflowError

MOST_NODES = 5_000  # the largest official template has 150
_MOST_LINKS = 50_000
_MOST_RUN = 100_000
_OUTER = ("-10", "-20")  # what stands for a subgraph's own inputs and outputs inside it
MEND = "open it in ComfyUI, save it there, and try again"


class _Places:
    """Names a place in the file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wrong(self, what: str, wanted: str) -> WorkflowError:
        return WorkflowError(f"the workflow is damaged: {self.name}{what}. Wanted: {wanted}; {MEND}")


def link_fields(link: Any) -> list[Any]:
    """[id, origin, its slot, target, its slot] of a link in either form."""
    if isinstance(link, dict):
        return [link.get(key) for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    return list(link[:5])


def shared_name(node: Mapping[str, Any]) -> str:
    """Under which name a SetNode or a GetNode shares a value."""
    found = node.get("widgets_values")
    return str(found[0]) if isinstance(found, list) and found else ""


def graphs_of(workflow: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name for messages, graph) of the workflow itself and of every subgraph's definition."""
    yield "", workflow
    for one in (workflow.get("definitions") or {}).get("subgraphs") or []:
        yield f"in subgraph {str(one.get('name') or one['id'])!r}: ", one


def check(workflow: dict[str, Any]) -> None:
    """Raises WorkflowError where a saved workflow (not in API format) is damaged."""
    root = _Places("")
    definitions = workflow.get("definitions")
    if definitions is not None and not isinstance(definitions, dict):
        raise root.wrong("its definitions are no object", "an object with subgraphs")
    subgraphs = (definitions or {}).get("subgraphs") or []
    if not _are(subgraphs, dict):
        raise root.wrong("its subgraphs are no list of objects", "a list of graphs")
    by_id: dict[str, Mapping[str, Any]] = {}
    for one in subgraphs:
        name = one.get("id")
        if not isinstance(name, str):
            raise root.wrong("a subgraph has no id", "a text that the nodes which use it have as their type")
        if name in by_id:
            raise root.wrong(f"two subgraphs have the id {name!r}", "one subgraph to an id")
        by_id[name] = one
        if not (isinstance(one.get("nodes"), list) and isinstance(one.get("links"), list)):
            raise root.wrong(f"subgraph {name!r} has no nodes and links", "a list of each")
        if not (_are(one.get("inputs") or [], dict) and _are(one.get("outputs") or [], dict)):
            raise root.wrong(f"subgraph {name!r} has inputs or outputs of another kind", "lists of objects")
    nodes = links = 0
    for place, graph in graphs_of(workflow):
        nodes, links = nodes + len(graph["nodes"]), links + len(graph["links"])
        if nodes > MOST_NODES or links > _MOST_LINKS:
            raise WorkflowError(
                f"the workflow is too large: wanted at most {MOST_NODES} nodes and {_MOST_LINKS} links, found more"
            )
        _check_graph(_Places(place), graph, inside=bool(place))
    _check_uses(workflow, by_id)


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(one, kind) for one in values)


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _check_graph(place: _Places, graph: Mapping[str, Any], inside: bool) -> None:
    nodes: dict[str, Any] = {}
    for node in graph["nodes"]:
        if not (isinstance(node, dict) and _is_id(node.get("id")) and isinstance(node.get("type"), str)):
            raise place.wrong("a node has no id or no type", "an object with both")
        if str(node["id"]) in nodes:
            raise place.wrong(f"two nodes have the id {node['id']}", "one node to an id")
        for side in ("inputs", "outputs"):
            if not _are(node.get(side) or [], dict):
                raise place.wrong(f"the {side} of node {node['id']} are no list of objects", "a list of objects")
        if not isinstance(node.get("mode") or 0, int):
            raise place.wrong(f"the mode of node {node['id']} is {node['mode']!r}", "a number: 0, 2 or 4")
        nodes[str(node["id"])] = node
    links: dict[Any, list[Any]] = {}
    for link in graph["links"]:
        if link is None:
            continue
        if not (isinstance(link, dict) or (isinstance(link, list) and len(link) >= 5)):
            raise place.wrong("a link is neither a list of six nor an object", "links as ComfyUI writes them")
        fields = link_fields(link)
        if not (_is_id(fields[0]) and _is_id(fields[1]) and _is_id(fields[3]) and isinstance(fields[2], int)):
            raise place.wrong(f"link {fields[0]!r} says {fields[1:]!r}", "ids and numbers")
        if fields[0] in links:
            raise place.wrong(f"two links have the id {fields[0]}", "one link to an id")
        links[fields[0]] = fields
    _check_links(place, nodes, links, inside)


def _check_links(place: _Places, nodes: dict[str, Any], links: dict[Any, list[Any]], inside: bool) -> None:
    before: dict[str, list[str]] = {}
    for name, node in nodes.items():
        for one in node.get("inputs") or []:
            number = one.get("link")
            if number is None:
                continue
            if not _is_id(number) or number not in links:
                raise place.wrong(
                    f"input {one.get('name')!r} of node {name} has link {number!r}", "a link that is there"
                )
            origin = str(links[number][1])
            if origin not in nodes and not (inside and origin == _OUTER[0]):
                raise place.wrong(f"link {number} to node {name} comes from node {origin}", "a node that is there")
            before.setdefault(name, []).append(origin)
    holders: dict[str, str] = {}  # SetNode and GetNode of KJNodes: links without a line
    for name, node in nodes.items():
        if node["type"] == "SetNode":
            holders.setdefault(shared_name(node), name)
    for name, node in nodes.items():
        if node["type"] == "GetNode" and shared_name(node) in holders:
            before.setdefault(name, []).append(holders[shared_name(node)])
    _check_circles(place, nodes, before)


def _check_circles(place: _Places, nodes: dict[str, Any], before: dict[str, list[str]]) -> None:
    waits = {name: sum(one in nodes for one in before.get(name, [])) for name in nodes}
    after: dict[str, list[str]] = {}
    for name, origins in before.items():
        for origin in origins:
            after.setdefault(origin, []).append(name)
    ready = [name for name, count in waits.items() if not count]
    done = 0
    while ready:
        done += 1
        for name in after.get(ready.pop(), []):
            waits[name] -= 1
            if not waits[name]:
                ready.append(name)
    if done < len(nodes):
        odd = next(name for name, count in waits.items() if count)
        raise place.wrong(f"the links run in a circle (through node {odd} or before it)", "links that run one way")


def _check_uses(workflow: Mapping[str, Any], definitions: Mapping[str, Mapping[str, Any]]) -> None:
    """No subgraph holds itself, and all of them together stay small once each use is counted."""
    sizes: dict[str, int] = {}
    waiting: dict[str, int] = {}

    def size(graph: Mapping[str, Any], name: str, level: int) -> int:
        if name in sizes:
            return sizes[name]
        if name in waiting or level > 100:
            raise WorkflowError(
                f"subgraph {str(graph.get('name') or name)!r} holds itself, or lies too deep. Wanted: at most 100 "
                "subgraphs inside each other; take one out in ComfyUI"
            )
        waiting[name] = level
        found = 0
        for node in graph["nodes"]:
            inner = definitions.get(node["type"])
            found += 1 if inner is None else size(inner, node["type"], level + 1)
            if found > _MOST_RUN:
                raise WorkflowError(
                    f"the workflow is too large: wanted at most {_MOST_RUN} nodes, found more, each use of a subgraph "
                    "counted"
                )
        del waiting[name]
        sizes[name] = found
        return found

    for name, one in definitions.items():
        size(one, name, 0)
    size(workflow, "", 0)
