"""Where a new node goes: near what it feeds, on nothing that is there. Nothing else is moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Box = tuple[float, float, float, float]  # left, top, right, bottom; in the pixels of the front end
_TITLE, _AIR, _STEP = 30.0, 30.0, 40.0
_RINGS = 60  # steps away that are tried
_MANY = 1000  # nodes above which no place is searched: it would take minutes
_TALLER = 80.0  # the canvas draws nodes lower than the other renderer


def _pair(value: Any) -> tuple[float, float] | None:
    """[x, y], or {"0": x, "1": y}, as older files have it."""
    if isinstance(value, Mapping):
        value = [value.get("0"), value.get("1")]
    if isinstance(value, list) and len(value) >= 2:
        x, y = value[:2]
        if all(isinstance(one, (int, float)) and abs(one) < 1e7 for one in (x, y)):
            return float(x), float(y)
    return None


def _box(node: Mapping[str, Any]) -> Box | None:
    place, size = _pair(node.get("pos")), _pair(node.get("size")) or (0.0, 0.0)
    return None if place is None else (place[0], place[1] - _TITLE, place[0] + size[0], place[1] + size[1])


def _boxes(graph: Mapping[str, Any]) -> list[Box]:
    found = [box for node in graph["nodes"] if (box := _box(node)) is not None]
    for name in ("inputNode", "outputNode"):
        side = graph.get(name)
        bounding = side.get("bounding") if isinstance(side, Mapping) else None
        if isinstance(bounding, list) and len(bounding) == 4:
            place, size = _pair(bounding[:2]), _pair(bounding[2:])
            if place and size:
                found.append((*place, place[0] + size[0], place[1] + size[1]))
    return found


def _rings() -> Iterable[tuple[int, int]]:
    """Steps to the side and down, the near ones first; at one distance rather up and to the left."""
    yield 0, 0
    for ring in range(1, _RINGS):
        around = [(x, y) for x in range(-ring, ring + 1) for y in (-ring, ring)]
        around += [(x, y) for x in (-ring, ring) for y in range(-ring + 1, ring)]
        yield from sorted(around, key=lambda step: (step[0] ** 2 + step[1] ** 2, step[1], step[0]))


def _groups(graph: Mapping[str, Any]) -> list[Box]:
    found = graph.get("groups")
    boundings = [one.get("bounding") for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
    places = [(_pair(one[:2]), _pair(one[2:])) for one in boundings if isinstance(one, list)]
    return [(*place, place[0] + size[0], place[1] + size[1]) for place, size in places if place and size]


def _touch(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def free_place(size: list[Any], targets: list[dict[str, Any]], graph: Mapping[str, Any]) -> list[float]:
    """[x, y] for a node of that size to the left of its targets, or near there. `graph`: the nodes to keep off.

    It stays in the group of its target, and out of others, where that is possible: groups are bypassed as a whole.
    """
    width, height = float(size[0]), float(size[1]) + _TALLER
    places = [place for one in targets if (place := _pair(one.get("pos"))) is not None]
    target = min(places, default=(0.0, 0.0))
    left, top = target[0] - width - 2 * _AIR, min((place[1] for place in places), default=0.0)
    if len(graph["nodes"]) > _MANY:
        return [round(left), round(top)]
    reach = 2 * _RINGS * _STEP + width + height
    near = [box for box in _boxes(graph) if _touch(box, (left - reach, top - reach, left + reach, top + reach))]
    groups = _groups(graph)
    around = [box for box in groups if box[0] <= target[0] < box[2] and box[1] <= target[1] < box[3]]
    home = max(around, key=lambda box: box[2] - box[0], default=None)
    others = [box for box in groups if box not in around]
    for strict in (True, False):
        for right, down in _rings():
            x, y = left + right * _STEP, top + down * _STEP
            mine = (x - _AIR, y - _TITLE - _AIR, x + width + _AIR, y + height + _AIR)
            body = (x, y - _TITLE, x + width, y + height)
            if strict and (any(_touch(body, box) for box in others) or (home and not _inside(body, home))):
                continue
            if not any(_touch(mine, box) for box in near):
                return [round(x), round(y)]
    return [round(left), round(min(box[1] for box in near) - height - 2 * _AIR)]


def _inside(one: Box, other: Box) -> bool:
    return other[0] <= one[0] and other[1] <= one[1] and one[2] <= other[2] and one[3] <= other[3]
