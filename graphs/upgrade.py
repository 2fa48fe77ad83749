"""Other packs' attention nodes made into this pack's, with the same meaning.

Sage3AttentionOnlySwitch; of KJNodes PathchSageAttentionKJ, PatchFlashAttentionKJ, and the loaders that patch attention.
"""

from __future__ import annotations

from typing import Any

from .book import Book
from .edit import BYPASSED, Done
from .graph import Graph
from .kinds import GGUF_KERNELS, KERNELS, SELECTOR, SWITCH, properties, saved_inputs, saved_node, values

# Widgets of the old nodes, in their order.
_OLD = {
    "Sage3AttentionOnlySwitch": ("enable", "print_backend"),
    "PathchSageAttentionKJ": ("sage_attention", "allow_compile"),
    "PatchFlashAttentionKJ": ("allow_compile",),
}
# Loaders: the widget that patches attention, its value for "not", and what its others mean.
_LOADERS = {
    "CheckpointLoaderKJ": ("sage_attention", "disabled", KERNELS),
    "DiffusionModelLoaderKJ": ("sage_attention", "disabled", KERNELS),
    "GGUFLoaderKJ": ("attention_override", "none", GGUF_KERNELS),
}
_MISSING = object()


def upgrade(book: Book) -> Done:
    """Replace what is known; what cannot be said in this pack's words is left, and told."""
    done = Done()
    for graph in book.graphs():
        for node in list(graph.nodes):
            if graph.kind(node) in _OLD:
                _patch(graph, node, done)
            elif graph.kind(node) in _LOADERS:
                _loader(graph, node, done)
    if not done.changed and not done.notes:
        done.notes.append(f"no node to replace: wanted one of {', '.join([*_OLD, *_LOADERS])}")
    return done


def _old_value(graph: Graph, node: str, name: str) -> Any:
    found = graph.nodes[node].get("widgets_values")
    if isinstance(found, dict):
        return found.get(name, _MISSING)
    place = _OLD[graph.kind(node)].index(name)
    return found[place] if isinstance(found, list) and place < len(found) else _MISSING


def _fed(graph: Graph, node: str, name: str) -> bool:
    """Does a link say what the widget holds?"""
    return any(one.get("name") == name and one.get("link") is not None for one in graph.nodes[node].get("inputs") or [])


def _patch(graph: Graph, node: str, done: Done) -> None:
    what, kind = graph.described(node), graph.kind(node)
    if kind == "Sage3AttentionOnlySwitch":
        on = _old_value(graph, node, "enable")
        _become(graph, node, SWITCH, enable=on if isinstance(on, bool) else True)
        done.changed.append(f"{what} is {SWITCH} now")
        return
    kernel: Any = "flash"
    if kind == "PathchSageAttentionKJ":
        value = _old_value(graph, node, "sage_attention")
        if _fed(graph, node, "sage_attention"):
            done.notes.append(f"{what} is left as it is: a link says what its sage_attention is, and names differ here")
            return
        if value in ("disabled", False):
            _off(graph, node, done)
            return
        kernel = KERNELS.get(value) if isinstance(value, str) else None
        if kernel is None:
            known = ", ".join(["disabled", *KERNELS])
            done.notes.append(f"{what} is left as it is: wanted a sage_attention of {known}; found {value!r}")
            return
    _become(graph, node, SELECTOR, kernel=kernel)
    done.changed.append(f"{what} is {SELECTOR} with kernel {kernel} now")


def _off(graph: Graph, node: str, done: Done) -> None:
    """ "disabled" gives the model on as it is."""
    what = graph.described(node)
    if graph.book.has_modes:
        _become(graph, node, SELECTOR, kernel="sage")
        graph.nodes[node]["mode"] = BYPASSED
        done.changed.append(f"{what} is {SELECTOR} with kernel sage now, bypassed, since it was disabled")
    else:
        graph.take_out(node)
        done.changed.append(f"{what} is taken out, since it was disabled")


def _become(graph: Graph, node: str, kind: str, **wanted: Any) -> None:
    """Make a node one of this pack's, in its place and with its links."""
    data = graph.nodes[node]
    old = {one.get("name"): one for one in data.get("inputs") or []}
    new = saved_inputs(kind)
    for slot, one in enumerate(new):
        number = old.pop(one["name"], {}).get("link")
        if number is not None:
            one["link"] = number
            graph.links[number].end_at(slot)
    for one in old.values():
        if one.get("link") is not None:
            graph.unlink(graph.links[one["link"]])
    given = (data.get("outputs") or [{}])[0].get("links")
    data["type"], data["inputs"] = kind, new
    data["outputs"] = [{"localized_name": "model", "name": "model", "type": "MODEL", "links": given}]
    data["widgets_values"] = list(values(kind, **wanted).values())
    kept = {name: value for name, value in (data.get("properties") or {}).items() if name not in ("aux_id", "ver")}
    data["properties"] = kept | properties(kind)


def _loader(graph: Graph, node: str, done: Done) -> None:
    name, off, kernels = _LOADERS[graph.kind(node)]
    what, data = graph.described(node), graph.nodes[node]
    found = data.get("widgets_values")
    if isinstance(found, dict):
        place: Any = name
    else:  # the order has changed between versions; the values are no other widget's
        places = [at for at, value in enumerate(found or []) if isinstance(value, str) and value in kernels]
        place = places[0] if len(places) == 1 else None
    value = found.get(name) if isinstance(found, dict) else found[place] if found and place is not None else off
    if value in (off, False, None):
        return
    if _fed(graph, node, name) or not isinstance(value, str) or value not in kernels:
        done.notes.append(f"{what} is left as it is: its {name} is {value!r}, or comes by a link")
        return
    links = list(graph.after.get((node, 0), []))
    if not links:
        done.notes.append(f"{what} is left as it is: its model is used by nothing")
        return
    data["widgets_values"][place] = off
    key = graph.put_in(saved_node(SELECTOR, kernel=kernels[value]), (node, 0), links)
    done.changed.append(
        f"{what}: {name} is {off} now, and {graph.described(key)} with kernel {kernels[value]} is behind it"
    )
