"""What the pack's nodes show after a run, in a real browser, in both of the front end's renderers."""

import pytest

from support.workflows import BYPASSED, NAMES, ONE_STAGE, SELECTORS, SWITCHES

T2V = "wan2.2_t2v_14b"
HIGH, LOW = SELECTORS
SAMPLERS = (57, 58)


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
    assert grown[1] >= bypassed[1]  # more where the node had no room left for it
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
    desk.set(110, value=3)
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


def test_a_run_that_was_stopped_says_so(desk):
    desk.open(T2V)
    desk.look_at(HIGH, LOW)
    desk.set(67, width=192, height=192)
    desk.set(110, value=60)
    desk.set(111, value=50)
    desk.comfy.call("() => app.api.addEventListener('progress', () => { window.sampling = true })")
    prompt = desk.press_run()
    desk.page.wait_for_function("() => window.sampling")
    desk.server.interrupt()
    desk.wait(prompt)
    assert desk.chips(HIGH) and "stopped" in desk.shows(HIGH)
    assert desk.shows(LOW) == "", "its stage was not reached"


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
    # The tab of an earlier test may hold the same workflow, but not its sizes any more.
    full = "() => app.graph.nodes.some(n => n.widgets?.some(w => w.name === 'width' && w.value > 64))"
    desk.page.wait_for_function(full)
    desk.shrink()
    desk.look_at(HIGH, LOW)
    desk.run()
    assert desk.shows(HIGH) and desk.shows(LOW)
