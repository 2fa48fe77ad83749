"""All graphs of a saved workflow: itself and its subgraphs, and the numbers that nodes and links get."""

from __future__ import annotations

from typing import Any

from .check import check, graphs_of
from .graph import Graph


class Book:
    """All graphs of a workflow. Raises WorkflowError where it is damaged.

    `has_modes`: nodes can be bypassed in this format.
    """

    has_modes = True

    def __init__(self, workflow: dict[str, Any]) -> None:
        check(workflow)
        self.workflow = workflow
        self.root = Graph(workflow, self, "")
        self.definitions: dict[str, Graph] = {}
        for _, raw in graphs_of(workflow):
            if raw is not workflow:
                self.definitions[raw["id"]] = Graph(raw, self, str(raw.get("name") or raw["id"]))
        known = [int(key) for one in [self.root, *self.definitions.values()] for key in one.nodes if _is_number(key)]
        self._highest = max([0, *known])
        self.uses: dict[str, list[tuple[Graph, str]]] = {}  # of a definition: the nodes that use it
        for graph in self.graphs():
            for key, node in graph.nodes.items():
                if node["type"] in self.definitions:
                    self.uses.setdefault(node["type"], []).append((graph, key))

    def graphs(self) -> list[Graph]:
        """The workflow itself, then its subgraphs, an outer one before those inside it."""
        found, done = [self.root], {""}
        for graph in found:  # it grows
            for node in graph.nodes.values():
                if node["type"] in self.definitions and node["type"] not in done:
                    done.add(node["type"])
                    found.append(self.definitions[node["type"]])
        return found

    def definition(self, kind: str) -> Graph | None:
        return self.definitions.get(kind)

    # Numbers. Ids of nodes are unique over all graphs, or the front end renumbers them; counters of graphs follow
    # where they stood at the last number, and stand there again once what was added is taken out.

    def _counters(self, graph: Graph) -> list[tuple[dict[str, Any], str, str]]:
        """(object, name of its counter of nodes, of links) for a graph, and for the workflow, which shares them."""
        found = []
        for raw in [graph.raw] if graph.is_root else [graph.raw, self.workflow]:
            state = raw.get("state")
            if isinstance(state, dict):
                found.append((state, "lastNodeId", "lastLinkId"))
            if "last_node_id" in raw:
                found.append((raw, "last_node_id", "last_link_id"))
        return found

    def new_node_id(self, graph: Graph) -> int:
        everywhere = [self.root, *self.definitions.values()]
        counters = [(one, name) for each in everywhere for one, name, _ in self._counters(each)]
        last = max([self._highest, *(one.get(name) or 0 for one, name in counters if _counts(one.get(name)))])
        for one, name, _ in self._counters(graph):
            if one.get(name) == last:  # else it counts something else; the front end raises it where it has to
                one[name] = last + 1
        self._highest = last + 1
        return last + 1

    def new_link_id(self, graph: Graph) -> int:
        counters = [(one, name) for one, _, name in self._counters(graph)[:1]]
        last = max([graph.highest_link, *(one.get(name) or 0 for one, name in counters if _counts(one.get(name)))])
        for one, name in counters:
            one[name] = last + 1
        graph.highest_link = last + 1
        return last + 1

    def forget(self, graph: Graph, number: Any) -> None:
        """A node is gone: its number, and the widgets of it that a subgraph's box shows outside."""
        for outer, key in self.uses.get(str(graph.raw.get("id")), []) if not graph.is_root else []:
            node = outer.nodes.get(key, {})
            shown, values = (node.get("properties") or {}).get("proxyWidgets"), node.get("widgets_values")
            if not isinstance(shown, list):
                continue
            for place in reversed(range(len(shown))):
                if isinstance(shown[place], list) and [str(one) for one in shown[place][:1]] == [str(number)]:
                    if isinstance(values, list) and len(values) == len(shown):
                        del values[place]
                    del shown[place]
        for one, name, _ in self._counters(graph):
            if one.get(name) == number:
                one[name] = number - 1

    def give_back_link(self, graph: Graph, number: Any) -> None:
        for one, _, name in self._counters(graph)[:1]:
            if one.get(name) == number:
                one[name] = number - 1


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
