"""A saved workflow as a graph: its nodes and links, and the two changes that all others are made of.

Everything is a view of the file's own objects, so that what is not touched stays as it was. Both forms of links are
read and written: lists (the workflow itself, as ComfyUI saves it) and objects (subgraphs, and a newer form of files).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .check import link_fields, shared_name
from .kinds import ORDERS
from .place import free_place

if TYPE_CHECKING:
    from .book import Book

Pin = tuple[str, int]  # (id of a node as text, number of its output)
OUTER, OUTWARD = "-10", "-20"  # inside a subgraph: what stands for its inputs, and for its outputs
_FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


class Link:
    """One link; `raw` is the file's."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.id, self._origin, self.slot, self._target, self.target_slot = link_fields(raw)

    @property
    def origin(self) -> Pin:
        return str(self._origin), self.slot

    @property
    def target(self) -> str:
        return str(self._target)

    def come_from(self, node: Any, slot: int) -> None:
        self._origin, self.slot = node, slot
        if isinstance(self.raw, dict):
            self.raw["origin_id"], self.raw["origin_slot"] = node, slot
        else:
            self.raw[1], self.raw[2] = node, slot

    def end_at(self, slot: int) -> None:
        """It ends at another input of the same node."""
        self.target_slot = slot
        if isinstance(self.raw, dict):
            self.raw["target_slot"] = slot
        else:
            self.raw[4] = slot


class Graph:
    """The workflow itself, or the definition of a subgraph. `book` holds all of them."""

    def __init__(self, raw: dict[str, Any], book: Book, name: str) -> None:
        self.raw, self.book, self.name = raw, book, name
        self.is_root = raw is book.workflow
        self.nodes: dict[str, dict[str, Any]] = {str(node["id"]): node for node in raw["nodes"]}
        self.links = {link.id: link for link in (Link(one) for one in raw["links"] if one is not None)}
        self.highest_link = max([0, *(number for number in self.links if isinstance(number, int))])
        used = {
            (key, one["link"]) for key, node in self.nodes.items() for one in node.get("inputs") or [] if "link" in one
        }
        # Files hold links to nodes that are gone.
        live = [
            link
            for link in self.links.values()
            if (link.target, link.id) in used or (link.target == OUTWARD and not self.is_root)
        ]
        self.holders: dict[str, str] = {}  # name → the SetNode of KJNodes that holds its value
        for key, node in self.nodes.items():
            if node["type"] == "SetNode":
                self.holders.setdefault(shared_name(node), key)
        self.after: dict[Pin, list[Link]] = {}
        for link in live:
            self.after.setdefault(link.origin, []).append(link)

    def mode(self, node: str) -> int:
        return int(self.nodes[node].get("mode") or 0)

    def kind(self, node: str) -> str:
        return str(self.nodes[node]["type"])

    def title(self, node: str) -> str:
        return str(self.nodes[node].get("title") or "")

    def described(self, node: str) -> str:
        """A node in words: "KSampler (3) in subgraph 'Sampling'"."""
        kind = self.kind(node)
        if (inner := self.book.definition(kind)) is not None:
            kind = f"subgraph {inner.name!r}"
        title = self.title(node)
        named = f", {title!r}" if title and title != kind else ""
        return f"{kind} ({node}{named}){'' if self.is_root else f' in subgraph {self.name!r}'}"

    def inputs(self, node: str, kind: str = "MODEL") -> list[tuple[str, Link]]:
        """(name, link) of the linked inputs of a type."""
        return [
            (str(one.get("name")), self.links[one["link"]])
            for one in self.nodes[node].get("inputs") or []
            if one.get("link") is not None and kind in str(one.get("type")).split(",")
        ]

    def unlinked(self, node: str) -> bool:
        """Does it have an input for a model, and nothing there?"""
        inputs = self.nodes[node].get("inputs") or []
        return any(one.get("type") == "MODEL" and one.get("link") is None for one in inputs)

    def types(self, node: str, side: str) -> list[str]:
        return [str(one.get("type")) for one in self.nodes[node].get(side) or []]

    def widget(self, node: str, name: str) -> Any:
        """The value of a widget whose input the file lists, None where it does not tell."""
        data = self.nodes[node]
        found = data.get("widgets_values")
        if isinstance(found, dict):
            return found.get(name)
        names = ORDERS.get(self.kind(node)) or [
            one["widget"].get("name") for one in data.get("inputs") or [] if isinstance(one.get("widget"), dict)
        ]
        if isinstance(found, list) and name in names and names.index(name) < len(found):
            return found[names.index(name)]
        return None

    # Reroutes that are drawn on links: several links from one output may share them.

    def _extra(self) -> dict[str, Any]:
        found = self.raw.get("extra")
        return found if isinstance(found, dict) else {}

    def _reroutes(self) -> dict[Any, dict[str, Any]]:
        found = self.raw.get("reroutes") or self._extra().get("reroutes") or []
        return {one.get("id"): one for one in found if isinstance(one, dict)} if isinstance(found, list) else {}

    def _extension(self, link: Link) -> dict[str, Any]:
        """What holds `parentId` of a link."""
        if isinstance(link.raw, dict):
            return link.raw
        found = self._extra().get("linkExtensions")
        for one in found if isinstance(found, list) else []:
            if isinstance(one, dict) and one.get("id") == link.id:
                return one
        return {}

    def reroutes_of(self, link: Link) -> list[dict[str, Any]]:
        """The reroutes on a link, the one nearest to its end first."""
        there, found = self._reroutes(), []
        at = self._extension(link).get("parentId")
        while at in there and there[at] not in found:
            found.append(there[at])
            at = there[at].get("parentId")
        return found

    def sharing(self, links: Iterable[Link]) -> list[Link]:
        """`links`, and those that share a reroute with one of them: it may have one origin only."""
        found = list(links)
        for link in found:  # it grows
            ids = {one.get("id") for one in self.reroutes_of(link)}
            for other in self.after.get(link.origin, []) if ids else []:
                if other not in found and ids & {one.get("id") for one in self.reroutes_of(other)}:
                    found.append(other)
        return found

    # The two changes.

    def _ends(self, pin: Pin) -> list[Any] | None:
        """The list of link ids that the file keeps at an output."""
        if pin[0] == OUTER:
            places, key = self.raw.get("inputs") or [], "linkIds"
        else:
            places, key = self.nodes[pin[0]].get("outputs") or [], "links"
        if not 0 <= pin[1] < len(places):
            return None
        if not isinstance(places[pin[1]].get(key), list):
            places[pin[1]][key] = []
        ends: list[Any] = places[pin[1]][key]
        return ends

    def put_in(self, node: dict[str, Any], pin: Pin, moved: list[Link]) -> str:
        """Put a new node behind an output: these links then come from it. Returns its id."""
        node["id"] = self.book.new_node_id(self)
        raw_origin = moved[0].raw["origin_id"] if isinstance(moved[0].raw, dict) else moved[0].raw[1]
        targets = [self.nodes[link.target] for link in moved if link.target in self.nodes]
        anchors = [one for link in moved for one in self.reroutes_of(link)[-1:]] or targets
        node["pos"] = free_place(node["size"], anchors, self.raw)
        node["order"] = targets[0].get("order", 0) if targets else 0
        key = str(node["id"])
        number = self.book.new_link_id(self)
        self._replace(self._ends(pin), [link.id for link in moved], [number])
        node["inputs"][0]["link"] = number
        node["outputs"][0]["links"] = [link.id for link in moved]
        for link in moved:
            link.come_from(node["id"], 0)
        values = (number, raw_origin, pin[1], node["id"], 0, "MODEL")
        as_object = isinstance(moved[0].raw, dict)
        raw: Any = dict(zip(_FIELDS, values, strict=True)) if as_object else list(values)
        self.raw["links"].append(raw)
        self.raw["nodes"].append(node)
        self.nodes[key] = node
        self.links[number] = Link(raw)
        self.after[pin] = [link for link in self.after.get(pin, []) if link not in moved] + [self.links[number]]
        self.after[(key, 0)] = list(moved)
        return key

    def take_out(self, key: str) -> None:
        """Take a node with a model in and out away; what it fed gets what fed it, or nothing."""
        node = self.nodes.pop(key)
        inputs = [one for one in node.get("inputs") or [] if one.get("link") is not None]
        model = next((self.links[one["link"]] for one in inputs if one.get("type") == "MODEL"), None)
        fed = self.after.pop((key, 0), [])
        for one in inputs:
            link = self.links[one["link"]]
            self._replace(self._ends(link.origin), [link.id], [other.id for other in fed] if link is model else [])
            self._hand_on(link, fed if link is model else [])
            self._drop(link)
        for link in fed:
            if model is None:
                self._cut(link)
            else:
                link.come_from(self._raw_id(model), model.slot)
                self.after.setdefault(model.origin, []).append(link)
        for link in [one for one in self.links.values() if one.origin[0] == key]:  # left over, used by nothing
            self._cut(link)
        self.raw["nodes"].remove(node)
        self.book.forget(self, node["id"])

    def unlink(self, link: Link) -> None:
        """Take a link away; what it fed is fed by nothing."""
        self._replace(self._ends(link.origin), [link.id], [])
        self._cut(link)

    @staticmethod
    def _raw_id(link: Link) -> Any:
        return link.raw["origin_id"] if isinstance(link.raw, dict) else link.raw[1]

    @staticmethod
    def _replace(ends: list[Any] | None, gone: list[Any], new: list[Any]) -> None:
        """In a list of ids, `new` in the place of the first that is gone."""
        if ends is None:
            return
        at = next((number for number, one in enumerate(ends) if one in gone), len(ends))
        ends[at:] = [*new, *(one for one in ends[at:] if one not in gone)]

    def _hand_on(self, link: Link, fed: list[Link]) -> None:
        """The reroutes on a link that goes away are those of the links that take its place."""
        chain = self.reroutes_of(link)
        for one in chain:
            if isinstance(one.get("linkIds"), list):
                self._replace(one["linkIds"], [link.id], [other.id for other in fed])
        for other in fed if chain else []:
            own = self.reroutes_of(other)
            holder = own[-1] if own else self._extension(other)
            if not holder and isinstance(other.raw, list):
                self.raw.setdefault("extra", {}).setdefault("linkExtensions", []).append(holder := {"id": other.id})
            holder["parentId"] = chain[0]["id"]
        if isinstance(link.raw, list) and (extension := self._extension(link)):
            self.raw["extra"]["linkExtensions"].remove(extension)

    def _cut(self, link: Link) -> None:
        """A link that nothing feeds any more."""
        for one in self.nodes.get(link.target, {}).get("inputs") or []:
            if one.get("link") == link.id:
                one["link"] = None
        if link.target == OUTWARD:
            for one in self.raw.get("outputs") or []:
                self._replace(one.get("linkIds"), [link.id], [])
        self._hand_on(link, [])
        self._drop(link)

    def _drop(self, link: Link) -> None:
        del self.links[link.id]
        self.after[link.origin] = [one for one in self.after.get(link.origin, []) if one is not link]
        self.raw["links"].remove(link.raw)
        self.book.give_back_link(self, link.id)
