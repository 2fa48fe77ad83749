"""The workflows in the real front end, in both of its renderers: they load whole, and look as they were laid out."""

import itertools

from attune_devtools import CACHE
from support.workflows import NAMES, bounds, inside, overlap, read

# Far enough out to show the widest workflow, near enough that the canvas renderer still draws the text of the notes.
VIEWPORT, SCALE, OFFSET = {"width": 2700, "height": 1700}, 0.66, (150, 190)
SHOW = """([scale, offset]) => {
    app.canvas.ds.scale = scale; app.canvas.ds.offset = offset; app.canvas.setDirty(true, true)
}"""
# Left, top, right and bottom of every node as drawn, title included; and how much taller a note's text is than its box.
MEASURE = """([scale, offset]) => app.graph.nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`)
    const [x, y] = node.pos, [width, height] = node.size
    let box = [x, y - 30, x + width, y + height]
    if (element) {
        const { left, top, right, bottom } = element.getBoundingClientRect()
        const { left: x0, top: y0 } = app.canvas.canvas.getBoundingClientRect()
        box = [(left - x0) / scale, (top - y0) / scale, (right - x0) / scale, (bottom - y0) / scale]
        box = box.map((value, i) => value - offset[i % 2])
    }
    const note = (element ?? node.widgets?.[0]?.element)?.querySelector('.comfy-markdown-content, .tiptap')
    return {
        id: node.id, type: node.type, box, errors: !!node.has_errors,
        cut: note ? note.scrollHeight - note.clientHeight : 0, drawn: !note || note.clientHeight > 0,
    }
})"""


def test_every_workflow_loads_whole_and_looks_as_laid_out(page):
    page.page.set_viewport_size(VIEWPORT)
    for name in NAMES:
        workflow = read(name)
        page.load(workflow)
        assert page.node_types_missing() == []
        assert page.prompt().keys() == page.server.api(workflow).keys(), f"{name}: the front end's prompt differs"
        nodes = measure(page)
        page.screenshot(picture(page, name))
        assert {node["id"] for node in nodes} == {str(node["id"]) for node in workflow["nodes"]}
        assert not [node for node in nodes if node["errors"]], name
        assert not [node for node in nodes if node["cut"] > 0], f"{name}: the text of a note is cut"
        for one, other in itertools.combinations(nodes, 2):
            assert not overlap(one["box"], other["box"]), (name, one, other)
        for node in nodes:
            assert any(inside(node["box"], bounds(group)) for group in workflow["groups"]), (name, node)
    assert page.problems == []


def test_what_the_front_end_saves_is_the_file(page):
    # A workflow that changes when it is only opened and saved would show as modified to everyone who opens it.
    for name in NAMES:
        workflow = read(name)
        page.load(workflow)
        saved = page.call("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
        assert saved["id"] == workflow["id"] and saved["links"] == workflow["links"]
        before = {node["id"]: node for node in workflow["nodes"]}
        for node in saved["nodes"]:
            expected = before[int(node["id"])]
            for key in ("type", "pos", "mode", "properties", "widgets_values", "inputs", "outputs"):
                assert node.get(key) == expected.get(key), (name, node["id"], key)


def measure(page) -> list[dict]:
    """Every node as the page draws it, once the picture has come to rest."""
    page.call(SHOW, [SCALE, OFFSET])
    before = None
    for _ in range(40):
        page.page.wait_for_timeout(250)
        now = page.call(MEASURE, [SCALE, OFFSET])
        if now == before and all(node["drawn"] for node in now):
            break
        before = now
    return now


def picture(page, name: str):
    """Where the screenshot goes: .cache/screenshots, to be looked at."""
    folder = CACHE / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}_{'vue' if page.vue else 'canvas'}.png"
