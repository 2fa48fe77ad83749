"""Changes to a workflow: selectors put in and taken out, nodes bypassed and enabled; and what `show` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..measure.workflow_file import WorkflowError
from .book import Book
from .branches import Tracer, branches, samplers
from .graph import Graph
from .kinds import ATTENTION, BESIDE, CHOOSERS, OWN, SELECTOR, saved_node

ACTIVE, MUTED, BYPASSED = 0, 2, 4
STATES = {MUTED: "muted", BYPASSED: "bypassed"}
MARK = "attune_bypassed"  # a property of what was bypassed together; web/panel/nodes.js has the same
NO_MODEL = (
    "nothing in the workflow samples with a model of ComfyUI's own (type MODEL): models of other kinds, as "
    "WanVideoWrapper's, and those that packs send without links are not reached"
)


@dataclass
class Done:
    """What was changed, and what was not and why, in words."""

    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def insert(book: Book, kernel: str, precision: str = "exact") -> Done:
    """Put a selector on every branch that has none. Raises WorkflowError where there is no branch."""
    done, tracer = Done(), Tracer(book)
    for graph in book.graphs():
        for one, data in graph.nodes.items():
            if data["type"].startswith(("workflow>", "workflow/")):
                done.notes.append(
                    f"{graph.described(one)} is a group node of older versions, and is not looked into: open the "
                    "workflow in ComfyUI, which makes a subgraph of it, save it and try again"
                )
        for branch in branches(graph):
            names = ", ".join(graph.described(node) for node in branch.samplers)
            if tracer.chosen(graph, branch.pin):
                there = [_with_state(*one) for one in reversed(tracer.chain(graph, branch.pin)) if _chooses(*one)]
                done.notes.append(f"{names}: has {' and '.join(there)} already")
                continue
            node = saved_node(SELECTOR, kernel=kernel, precision=precision)
            modes = {graph.mode(one) for one in branch.samplers}
            if len(modes) == 1:  # a part that is bypassed stays so as a whole, and is enabled as a whole
                node["mode"] = modes.pop()
            key = graph.put_in(node, branch.pin, branch.links)
            state = f", {STATES[node['mode']]} as they are" if node["mode"] in STATES else ""
            done.changed.append(f"{graph.described(key)} put in before {names}{state}")
    loose = [graph.described(node) for graph, node in samplers(book) if graph.unlinked(node)]
    if loose:
        done.notes.append(f"no model is linked to {', '.join(loose)}: left as it is")
    if not done.changed and not done.notes:
        raise WorkflowError(NO_MODEL)
    return done


def _chooses(graph: Graph, node: str) -> bool:
    return graph.kind(node) in CHOOSERS


def _with_state(graph: Graph, node: str) -> str:
    state = STATES.get(graph.mode(node), "")
    return f"{graph.described(node)}{f', {state},' if state else ''}"


def find(book: Book, types: Sequence[str], ids: Sequence[str], known: Sequence[str]) -> list[tuple[Graph, str]]:
    """The nodes of these types and ids; without either those of the types in `known`. Raises WorkflowError.

    An id is the node's number, in whatever graph; "38:5" is node 5 of the subgraph that node 38 uses.
    """
    found = []
    for graph in book.graphs():
        for node in graph.nodes:
            kind = graph.kind(node)
            if (kind in (types or known) if types or not ids else True) and (not ids or _has_id(graph, node, ids)):
                found.append((graph, node))
    if found:
        return found
    there = [graph.described(node) for graph in book.graphs() for node in graph.nodes if graph.kind(node) in ATTENTION]
    wanted = " and ".join(
        part for part in (f"type {', '.join(types)}" if types else "", f"id {', '.join(ids)}" if ids else "") if part
    )
    raise WorkflowError(
        f"the workflow has no {f'node of {wanted}' if wanted else 'attention node'}. Its attention nodes: "
        f"{', '.join(there) or 'none; `attune workflow insert` puts them in'}"
    )


def _has_id(graph: Graph, node: str, ids: Sequence[str]) -> bool:
    if node in ids:
        return True
    uses = [key for _, key in graph.book.uses.get(str(graph.raw.get("id")), [])] if not graph.is_root else []
    return any(
        one.rpartition(":")[2] == node and one.rpartition(":")[0].split(":")[-1] in uses for one in ids if ":" in one
    )


def switch(book: Book, on: bool, types: Sequence[str], ids: Sequence[str]) -> Done:
    """Bypass nodes, or enable them.

    What is bypassed together is marked, as the panel's "bypass all" does, and enabled together: what was bypassed
    before stays so. Where none is marked, and for a node that `ids` names, all bypassed ones are enabled. Muted nodes
    stay muted, unless `ids` name them for enabling.
    """
    if not book.has_modes:
        raise WorkflowError(
            "the API format has no bypass. Wanted: the workflow as ComfyUI saves it (Workflow, Save); of this one "
            "`attune workflow remove` takes the nodes out"
        )
    done = Done()
    found = find(book, types, ids, ATTENTION)
    marked = [(graph, node) for graph, node in found if graph.mode(node) == BYPASSED and _marks(graph, node).get(MARK)]
    for graph, node in found:
        mode, what = graph.mode(node), graph.described(node)
        if mode == (ACTIVE if on else BYPASSED):
            done.notes.append(f"{what} is {'enabled' if on else 'bypassed'} already")
        elif mode == MUTED and not (on and ids):
            done.notes.append(f"{what} is muted and stays so; `attune workflow enable --id {node}` enables it")
        elif on and marked and not ids and (graph, node) not in marked:
            done.notes.append(
                f"{what} was bypassed before the others and stays so; `attune workflow enable --id {node}` enables it"
            )
        else:
            data = graph.nodes[node]
            data["mode"] = ACTIVE if on else BYPASSED
            if data.get("properties") is None:
                data["properties"] = {}
            _marks(graph, node).pop(MARK, None)
            if not on and not ids:
                _marks(graph, node)[MARK] = True
            uses = 0 if graph.is_root else len(book.uses.get(graph.raw["id"], []))
            shared = f", in all {uses} uses of that subgraph" if uses > 1 else ""
            done.changed.append(f"{what} {'enabled' if on else 'bypassed'}{shared}")
    return done


def _marks(graph: Graph, node: str) -> dict[str, Any]:
    found = graph.nodes[node].get("properties")
    return found if isinstance(found, dict) else {}


def remove(book: Book, types: Sequence[str], ids: Sequence[str]) -> Done:
    """Take this pack's nodes that a model goes through out; what they fed gets the model that they got."""
    done = Done()
    chosen = find(book, types, ids, OWN)
    odd = [graph.described(node) for graph, node in chosen if graph.kind(node) not in ATTENTION]
    if odd:
        raise WorkflowError(f"only attention nodes are removed. Wanted one of {', '.join(ATTENTION)}; found {odd[0]}")
    for graph, node in reversed(chosen):  # the last first: its number is the highest, and is free again
        done.changed.insert(0, f"{graph.described(node)} removed")
        graph.take_out(node)
    for graph in book.graphs():
        left = [graph.described(node) for node in graph.nodes if graph.kind(node) in BESIDE]
        done.notes += [f"{what} is left: it is of this pack, but no attention node" for what in left]
    return done


def attention_nodes(book: Book) -> list[tuple[Graph, str]]:
    return [(graph, node) for graph in book.graphs() for node in graph.nodes if graph.kind(node) in ATTENTION]


def rows(book: Book) -> list[dict[str, Any]]:
    """For `show`: one row per sampler, with the attention nodes on its model, in the order the model goes through."""
    tracer, found = Tracer(book), []
    for graph, node in samplers(book):
        for name, link in graph.inputs(node):
            chain = [_row(*one) for one in reversed(tracer.chain(graph, link.origin))]
            everywhere = tracer.chosen(graph, link.origin)
            found.append({**_row(graph, node), "input": name, "attention": chain, "on_every_way": everywhere})
    return found


def _row(graph: Graph, node: str) -> dict[str, Any]:
    return {
        "id": graph.nodes[node]["id"],
        "type": graph.kind(node),
        "title": graph.title(node),
        "subgraph": graph.name,
        "state": STATES.get(graph.mode(node), "active"),
        "kernel": graph.widget(node, "kernel") or graph.widget(node, "sage_attention"),
        "described": graph.described(node),
    }
