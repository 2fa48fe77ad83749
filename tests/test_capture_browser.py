"""What the node AttentionCapture shows in the browser, in both renderers."""

from __future__ import annotations

ADD = """() => {
    const find = (id) => app.graph.nodes.find(n => String(n.id) === id);
    const node = LiteGraph.createNode("AttentionCapture");
    node.pos = [0, 2500];
    app.graph.add(node);
    const from = find("37"), to = find("54");
    from.connect(0, node, 0);
    node.connect(0, to, 0);
    return String(node.id);
}"""


def test_its_face_names_the_file_and_is_gone_when_bypassed(desk):
    desk.open("wan2.2_t2v_14b")
    node = desk.comfy.call(ADD)
    desk.look_at(node)
    desk.run()
    text = desk.shows(node)
    assert "Wrote 2 calls (0.3 MiB) to attune/capture_" in text and "attune bench --inputs" in text
    desk.look_at(node)
    desk.screenshot("capture")
    desk.click(node)
    desk.press("Control+b")
    assert desk.mode(node) == 4
    desk.run()
    assert desk.shows(node) == ""
