"""Whose text a node shows: over caches, tabs, reloads, undos and subgraphs, in a real browser, in both renderers."""

import pytest

from support.workflows import BYPASSED, SELECTORS, SWITCHES

T2V = "wan2.2_t2v_14b"
HIGH, LOW = SELECTORS


def test_nodes_and_samplers_that_were_cached_show_what_still_stands(desk):
    desk.open(T2V)
    desk.look_at(HIGH, LOW)
    desk.set(57, noise_seed=11)
    run = desk.run()
    before = desk.shows(HIGH), desk.shows(LOW)
    assert all(before)
    desk.set(57, noise_seed=12)
    run = desk.run()
    assert {str(HIGH), str(LOW)} <= run.cached and not {"57", "58"} & run.cached
    assert (desk.shows(HIGH), desk.shows(LOW)) == before
    desk.set(57, noise_seed=12)
    run = desk.run()
    assert run.runs == [] and {"57", "58"} <= run.cached, "nothing was sampled at all"
    assert (desk.shows(HIGH), desk.shows(LOW)) == before


def test_going_back_to_an_earlier_kernel_shows_that_kernel(desk):
    """The server may still hold the earlier result, and then samples nothing."""
    desk.open(T2V)
    desk.look_at(HIGH, LOW)
    for kernel in ("sdpa", "sdpa_math", "sdpa"):
        desk.set(HIGH, kernel=kernel)
        desk.set(57, noise_seed=21)
        desk.run()
        assert desk.chips(HIGH) == [kernel]
        assert desk.shows(LOW)


def test_nothing_lands_on_another_open_workflow(desk):
    first = desk.open(T2V)
    one = desk.tab()
    desk.run()
    desk.open("wan2.2_i2v_14b")
    desk.look_at(HIGH, LOW)
    assert [desk.shows(HIGH), desk.shows(LOW)] == ["", ""], "another workflow with the same node ids"
    # The same file once more: even the ids of the two workflows are equal.
    desk.comfy.load(first)
    desk.shrink()
    two = desk.tab()
    assert two != one
    desk.look_at(HIGH, LOW)
    assert [desk.shows(HIGH), desk.shows(LOW)] == ["", ""], "a copy with the same workflow id"
    desk.switch_to(one)
    desk.look_at(HIGH, LOW)
    assert desk.chips(HIGH) and desk.chips(LOW)
    assert desk.shows(HIGH)


def test_a_run_that_ends_behind_another_tab_is_shown_when_its_tab_is_opened(desk):
    desk.open("wan2.2_i2v_14b")
    other = desk.tab()
    desk.open(T2V)
    here = desk.tab()
    desk.set(57, noise_seed=31)
    desk.set(67, width=256, height=256)
    prompt = desk.press_run()
    desk.switch_to(other)
    desk.wait(prompt)
    desk.look_at(HIGH, LOW)
    assert [desk.shows(HIGH), desk.shows(LOW)] == ["", ""]
    desk.switch_to(here)
    desk.look_at(HIGH, LOW)
    assert desk.shows(HIGH) and desk.shows(LOW)


def test_a_reload_of_the_page_brings_the_text_back_to_its_own_tab(desk):
    workflow = desk.open(T2V)
    one = desk.tab()
    desk.look_at(HIGH, LOW)
    desk.run()
    before = desk.shows(HIGH), desk.shows(LOW)
    assert all(before)
    desk.comfy.load(workflow)
    two = desk.tab()
    desk.settle()
    desk.reload()
    assert {one, two} <= set(desk.tabs())
    assert desk.tab() == two
    desk.look_at(HIGH, LOW)
    assert [desk.shows(HIGH), desk.shows(LOW)] == ["", ""]
    desk.switch_to(one)
    desk.look_at(HIGH, LOW)
    assert (desk.shows(HIGH), desk.shows(LOW)) == before


def test_an_undo_keeps_the_text(desk):
    desk.open(T2V)
    desk.look_at(HIGH, LOW)
    desk.run()
    before = desk.shows(HIGH)
    desk.click(LOW)
    desk.press("Control+b")
    assert desk.mode(LOW) == BYPASSED
    desk.press("Control+z")
    desk.settle()
    assert desk.mode(LOW) == 0
    assert desk.shows(HIGH) == before and desk.shows(LOW)


def test_the_text_is_neither_saved_nor_sent(desk):
    desk.open(T2V)
    desk.look_at(HIGH, LOW)
    saved, prompt = desk.saved(), desk.comfy.prompt()
    desk.run()
    assert desk.shows(HIGH)
    after = desk.saved()
    seed = desk.comfy.prompt()["57"]["inputs"]["noise_seed"]  # drawn anew after each run
    prompt["57"]["inputs"]["noise_seed"] = seed
    assert desk.comfy.prompt() == prompt
    for one, other in zip(saved["nodes"], after["nodes"], strict=True):
        if one["id"] != 57:
            assert one.get("widgets_values") == other.get("widgets_values")
        if one["id"] in (HIGH, LOW):
            assert one["size"] == pytest.approx(other["size"], abs=1), "nor is the room that it takes"


def test_a_selector_in_a_subgraph_shows_its_text_when_the_subgraph_is_opened(desk):
    desk.open(T2V)
    desk.look_at(HIGH, SWITCHES[0])
    desk.click(HIGH)
    desk.click(SWITCHES[0], keys=("Control",))
    desk.press("Control+Shift+e")
    desk.settle()
    (outer,) = desk.comfy.call("() => app.graph.nodes.filter(n => n.isSubgraphNode?.()).map(n => String(n.id))")
    run = desk.run()
    (inner,) = (node for node in run.runs[0]["nodes"] if node.startswith(f"{outer}:"))
    open_subgraph(desk, outer)
    desk.look_at(inner.split(":")[1])
    assert desk.chips(inner.split(":")[1]) == list(run.runs[0]["nodes"][inner]["observed"])
    assert desk.shows(inner.split(":")[1])
    desk.screenshot("subgraph")

    # And once more inside: two levels deep, queued from within.
    desk.click(inner.split(":")[1])
    desk.press("Control+Shift+e")
    desk.settle()
    (middle,) = desk.comfy.call("() => app.canvas.graph.nodes.filter(n => n.isSubgraphNode?.()).map(n => String(n.id))")
    run = desk.run()
    (deep,) = (node for node in run.runs[0]["nodes"] if node.startswith(f"{outer}:{middle}:"))
    open_subgraph(desk, middle)
    desk.look_at(deep.split(":")[2])
    assert desk.shows(deep.split(":")[2])


def open_subgraph(desk, node: str) -> None:
    desk.comfy.call(
        "(id) => { const node = app.canvas.graph.nodes.find(n => String(n.id) === id);"
        "app.canvas.openSubgraph(node.subgraph, node) }",
        node,
    )
    desk.settle()


def test_a_node_like_one_that_ran_before_shows_its_own_text(desk):
    """The server must not hand it the other node's cached output, which speaks in that node's name."""
    desk.open(T2V)
    desk.run()
    copy = desk.comfy.call(
        """([id, next]) => {
            const find = (id) => app.graph.nodes.find(n => String(n.id) === id);
            const old = find(id), copy = old.clone();
            copy.pos = [old.pos[0], old.pos[1]];
            app.graph.add(copy);
            find("91").connect(0, copy, 0);
            copy.connect(0, find(next), 0);
            app.graph.remove(old);
            return String(copy.id);
        }""",
        [str(HIGH), str(SWITCHES[0])],
    )
    desk.look_at(copy, LOW)
    assert desk.shows(copy) == "", "it has not run"
    desk.run()
    assert desk.shows(copy) and desk.shows(LOW)
