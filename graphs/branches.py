"""Model branches: what samples with which model, what stands on the way, and where a selector belongs.

A branch is an output that gives a model to something that samples, or to a guider. A selector is put behind it once,
so behind every patch (LoRA, ModelSampling, …), and all that samples with this output gets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .book import Book
from .check import shared_name
from .graph import OUTER, OUTWARD, Graph, Link, Pin
from .kinds import ATTENTION, CHOOSERS, NOT_SAMPLERS, PASSIVE


def samples(graph: Graph, node: str) -> bool:
    """Does a node sample with the model that it takes, or hand it to something that does in another form?"""
    kind = graph.kind(node)
    if kind in NOT_SAMPLERS or kind in ATTENTION or kind in ("Reroute", "SetNode", "GetNode"):
        return False
    if graph.book.definition(kind) is not None or "MODEL" not in graph.types(node, "inputs"):
        return False
    gives = set(graph.types(node, "outputs"))
    if "MODEL" in gives:  # a patch, or one of the samplers that hand their model on
        return "LATENT" in gives and "LATENT" in graph.types(node, "inputs")
    return bool(gives - PASSIVE)


def samplers(book: Book) -> Iterator[tuple[Graph, str]]:
    for graph in book.graphs():
        for node in graph.nodes:
            if samples(graph, node):
                yield graph, node


def _link_into(graph: Graph, node: str) -> Link | None:
    """The link whose model comes out of a Reroute, SetNode or GetNode unchanged; None for other nodes."""
    kind = graph.kind(node)
    if kind == "GetNode":
        holder = graph.holders.get(shared_name(graph.nodes[node]))
        if holder is None:
            return None
        node = holder
    elif kind not in ("Reroute", "SetNode"):
        return None
    inputs = graph.nodes[node].get("inputs") or []
    number = inputs[0].get("link") if inputs else None
    return graph.links.get(number)


def _way(graph: Graph, link: Link) -> list[Link]:
    """The links from the output that makes a model to here: one, and one more for each reroute between."""
    found = [link]
    while found[0].origin[0] != OUTER:
        before = _link_into(graph, found[0].origin[0])
        if before is None:
            break
        found.insert(0, before)
    return found


class Tracer:
    """What stands before an output, through subgraphs."""

    def __init__(self, book: Book) -> None:
        self.book = book

    def before(self, graph: Graph, pin: Pin) -> list[tuple[Graph, Pin]]:
        """The outputs whose model this output gives on."""
        node, slot = pin
        if node == OUTER:
            return [
                one for outer, use in self.book.uses.get(graph.raw["id"], []) for one in _given(outer, use, graph, slot)
            ]
        inner = self.book.definition(graph.kind(node))
        if inner is not None:
            ends = [link for link in inner.links.values() if link.target == OUTWARD and link.target_slot == slot]
            return [(inner, link.origin) for link in ends]
        through = _link_into(graph, node)
        if through is not None:
            return [(graph, through.origin)]
        return [(graph, link.origin) for _, link in graph.inputs(node)]

    def chain(self, graph: Graph, pin: Pin) -> list[tuple[Graph, str]]:
        """The attention nodes on the ways to an output, the one nearest to it first."""
        found: list[tuple[Graph, str]] = []
        left, seen = [(graph, pin)], set()
        for at, here in left:  # it grows
            if (id(at), here) in seen:
                continue
            seen.add((id(at), here))
            if here[0] != OUTER and at.kind(here[0]) in ATTENTION and (at, here[0]) not in found:
                found.append((at, here[0]))
            left += self.before(at, here)
        return found

    def chosen(self, graph: Graph, pin: Pin) -> bool:
        """Does a node choose the kernel on every way to an output?"""
        left, seen = [(graph, pin)], set()
        for at, here in left:  # it grows
            if (id(at), here) in seen:
                continue
            seen.add((id(at), here))
            if here[0] != OUTER and at.kind(here[0]) in CHOOSERS:
                continue
            before = self.before(at, here)
            if not before:
                return False
            left += before
        return True


def _given(outer: Graph, use: str, inner: Graph, slot: int) -> list[tuple[Graph, Pin]]:
    """What a node that uses a subgraph gives to one of the subgraph's inputs."""
    named = inner.raw.get("inputs") or []
    name = named[slot].get("name") if 0 <= slot < len(named) else None
    for one in outer.nodes[use].get("inputs") or []:
        if one.get("name") == name and one.get("link") is not None:
            return [(outer, outer.links[one["link"]].origin)]
    return []


@dataclass
class Branch:
    """One place for a selector: links that come from `pin` and lead to `samplers`, or subgraphs with some."""

    graph: Graph
    pin: Pin
    links: list[Link]
    samplers: list[str]


def _taking(graph: Graph, node: str) -> list[Link]:
    """The links whose model a node samples with, or a subgraph does in which no patch comes before that."""
    inner = graph.book.definition(graph.kind(node))
    if inner is None:
        return [link for _, link in graph.inputs(node)] if samples(graph, node) else []
    named = inner.raw.get("inputs") or []
    direct = {named[slot].get("name") for slot in _direct(inner) if 0 <= slot < len(named)}
    return [link for name, link in graph.inputs(node) if name in direct]


def _direct(inner: Graph) -> set[int]:
    """The inputs of a subgraph whose model is sampled with as it comes in."""
    slots = set()
    for node in inner.nodes:
        slots |= {way[0].slot for link in _taking(inner, node) if (way := _way(inner, link))[0].origin[0] == OUTER}
    return slots


def branches(graph: Graph) -> list[Branch]:
    """The branches of one graph, an upstream one before those behind it; not those that come in from outside."""
    ways: dict[Pin, list[tuple[str, list[Link]]]] = {}
    for node in graph.nodes:
        for link in _taking(graph, node):
            way = _way(graph, link)
            if way[0].origin[0] != OUTER:
                ways.setdefault(way[0].origin, []).append((node, way))
    found = []
    for same in ways.values():
        last = max(  # the last output that all of them come through
            number
            for number in range(min(len(way) for _, way in same))
            if len({way[number].origin for _, way in same}) == 1
        )
        moved = graph.sharing(dict.fromkeys(way[last] for _, way in same))
        found.append(Branch(graph, moved[0].origin, moved, list(dict.fromkeys(node for node, _ in same))))
    return sorted(found, key=lambda branch: _level(graph, branch.pin))


def _level(graph: Graph, pin: Pin) -> int:
    """How many nodes with a model lie before an output, on the longest way."""
    levels: dict[str, int] = {}
    todo = [pin[0]]
    while todo:
        node = todo[-1]
        if node == OUTER or node in levels:
            levels.setdefault(node, 0)
            todo.pop()
            continue
        through = _link_into(graph, node)
        before = [through.origin[0]] if through else [link.origin[0] for _, link in graph.inputs(node)]
        missing = [one for one in before if one not in levels]
        if missing and len(todo) <= len(graph.nodes):
            todo += missing
            continue
        levels[node] = 1 + max((levels.get(one, 0) for one in before), default=0)
        todo.pop()
    return levels[pin[0]]
