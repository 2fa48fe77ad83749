"""What the pack's nodes show after a run, in a real browser, in both of the front end's renderers."""

import pytest

from support.browser import ComfyPage
from support.browser_nodes import Desk
from support.workflows import BYPASSED, NAMES, ONE_STAGE, SELECTORS, SWITCHES

T2V = "wan2.2_t2v_14b"
HIGH, LOW = SELECTORS
SAMPLERS = (57, 58)


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "vue"])
def shared(request, browser, server, tmp_path_factory):
    page = ComfyPage(browser, server, request.param)
    yield Desk(page, tmp_path_factory.mktemp("pictures"))
    page.close()


@pytest.fixture
def desk(shared):
    """A page of its renderer, with the workflows of earlier tests still open in other tabs, as at a user's."""
    before = len(shared.problems)
    yield shared
    assert shared.problems[before:] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_workflow_shows_which_kernel_ran(desk, name):
    desk.open(name)
    assert desk.comfy.node_types_missing() == []
    selectors = SELECTORS[:1] if name == ONE_STAGE else SELECTORS
    switches = SWITCHES[:1] if name == ONE_STAGE else SWITCHES
    desk.look_at(*selectors, *switches)
    assert [desk.shows(node) for node in (*selectors, *switches)] == [""] * len((*selectors, *switches))
    run = desk.run()
    assert len(run.runs) == len(selectors)
    for selector, done in zip(selectors, run.runs, strict=True):
        observed = done["nodes"][str(selector)]["observed"]
        assert observed
        assert desk.chips(selector) == list(observed)
        assert all(f"×{count}" in desk.shows(selector) for count in observed.values())
    assert [desk.shows(switch) for switch in switches] == [""] * len(switches), "they are bypassed"
    desk.screenshot(name)


def test_a_kernel_that_cannot_run_warns_and_says_why(desk):
    def change(nodes):
        nodes[HIGH]["widgets_values"][0] = "sage3"
        nodes[SWITCHES[0]]["mode"] = nodes[SWITCHES[1]]["mode"] = 0

    desk.open(T2V, change=change)
    desk.look_at(HIGH, SWITCHES[0], LOW, SWITCHES[1])
    run = desk.run()
    desk.screenshot("refused")
    assert all(chip.endswith("!") for chip in desk.chips(HIGH))
    refused = run.runs[0]["nodes"][str(HIGH)]["refused"][0]
    assert f"not {refused['kernel']}" in desk.shows(HIGH) and refused["reasons"][0] in desk.shows(HIGH)
    assert not any(chip.endswith("!") for chip in desk.chips(LOW)), "auto may choose whatever it likes"
    assert "not worth it" in desk.shows(SWITCHES[0]), "the switch's advice is there"


def test_a_bypassed_node_shows_nothing_after_the_next_run(desk):
    desk.open(T2V)
    desk.look_at(HIGH, LOW)
    desk.click(HIGH)
    desk.press("Control+b")
    desk.settle()
    bypassed = desk.size(HIGH)  # the Vue renderer adds a badge to a bypassed node
    desk.press("Control+b")
    desk.run()
    assert desk.shows(HIGH) and desk.shows(LOW)
    grown = desk.size(HIGH)
    assert grown[1] > bypassed[1]
    desk.click(HIGH)
    desk.press("Control+b")
    assert desk.mode(HIGH) == BYPASSED
    run = desk.run()
    assert [list(done["nodes"]) for done in run.runs] == [[str(LOW)]]
    assert desk.shows(HIGH) == "" and desk.shows(LOW)
    assert desk.size(HIGH) == bypassed, "the text takes no room where there is none"
    desk.screenshot("bypassed")
    desk.click(HIGH)
    desk.press("Control+b")
    desk.run()
    assert desk.shows(HIGH)
    assert desk.size(HIGH) == grown


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
    desk.comfy.call("() => { for (const n of app.graph.nodes) for (const w of n.widgets ?? []) if (w.name === 'width') w.value = 256 }")
    prompt = desk.press_run()
    desk.switch_to(other)
    desk.server.wait(prompt)
    desk.page.wait_for_function("(id) => window.endedPrompts.has(id)", arg=prompt)
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


def test_one_selector_for_two_samplers_shows_both_runs(desk):
    desk.open(T2V)
    desk.look_at(HIGH, LOW)
    desk.comfy.call(
        "(ids) => { const [from, to] = ids.map(id => app.graph.nodes.find(n => String(n.id) === id));"
        "from.connect(0, to, 0) }",
        [str(HIGH), str(SWITCHES[1])],
    )
    desk.set(HIGH, kernel="sdpa")
    desk.run()
    assert desk.chips(HIGH) == ["sdpa"] and "each of 2 samplers" in desk.shows(HIGH)
    assert desk.shows(LOW) == "", "nothing hangs on it any more"
    # Of the second sampler's calls only some reach the rule: now the two say something different.
    desk.comfy.call("() => { for (const n of app.graph.nodes) if (String(n.id) === '110') n.widgets[0].value = 3 }")
    desk.run()
    text = desk.shows(HIGH)
    desk.screenshot("two-samplers")
    assert all(f"#{sampler}" in text for sampler in SAMPLERS)
    assert desk.chips(HIGH) == ["sdpa", "sdpa"]


def test_the_old_text_is_faint_while_the_next_run_goes_on(desk):
    desk.open(T2V)
    desk.look_at(HIGH, LOW)
    desk.set(57, noise_seed=41)
    desk.run()
    desk.set(57, noise_seed=42)
    desk.comfy.call(
        """() => {
            window.seen = [];
            const faces = app.graph.nodes.flatMap(n => n.widgets ?? []).filter(w => w.name === "attune_status");
            for (const { element } of faces) new MutationObserver(() =>
                window.seen.push(element.shadowRoot.querySelector(".run.old") ? "old" : "new")
            ).observe(element.shadowRoot, { childList: true, subtree: true });
        }"""
    )
    desk.run()
    assert desk.comfy.call("() => window.seen") == ["old", "old", "new", "new"]


def test_every_node_of_the_pack_has_a_face(desk):
    """Also the deprecated ones, which stand for nodes of other packs."""
    desk.open(T2V)
    kinds = [
        "AttentionSelector", "SDPAForce", "Sage3Switch", "AttentionRule",
        "Sage3AttentionOnlySwitch", "PathchSageAttentionKJ", "PatchFlashAttentionKJ",
    ]  # fmt: skip
    nodes = desk.comfy.call(
        """(kinds) => {
            const find = (id) => app.graph.nodes.find(n => String(n.id) === id);
            let model = find("37"), x = 0;
            const made = [];
            for (const kind of kinds) {
                const node = LiteGraph.createNode(kind);
                node.pos = [x += 420, 2500];
                app.graph.add(node);
                model.connect(0, node, 0);
                for (const w of node.widgets) {
                    if (w.name === "kernel" && kind === "AttentionRule") w.value = "sdpa";
                    if (w.name === "sage_attention") w.value = "sageattn_qk_int8_pv_fp16_cuda";
                }
                made.push(String(node.id));
                model = node;
            }
            model.connect(0, find("54"), 0);
            return made;
        }""",
        kinds,
    )
    desk.look_at(*nodes)
    run = desk.run()
    assert set(run.runs[0]["nodes"]) == set(nodes)
    desk.look_at(*nodes[:4])
    desk.screenshot("kinds-own")
    shown = {kind: desk.shows(node) for kind, node in zip(kinds[:4], nodes[:4], strict=True)}
    desk.look_at(*nodes[4:])
    desk.screenshot("kinds-aliases")
    shown |= {kind: desk.shows(node) for kind, node in zip(kinds[4:], nodes[4:], strict=True)}
    assert all(shown.values()), shown


def test_a_workflow_opens_from_the_templates_dialog_and_runs(desk):
    desk.comfy.call("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = desk.page.get_by_role("dialog")
    dialog.get_by_text("ComfyUI-Attune").first.click()
    dialog.get_by_test_id(f"template-workflow-{T2V}").click()
    desk.page.wait_for_function("(id) => app.graph.nodes.some(n => String(n.id) === id)", arg=str(HIGH))
    desk.shrink()
    desk.look_at(HIGH, LOW)
    desk.run()
    assert desk.shows(HIGH) and desk.shows(LOW)
