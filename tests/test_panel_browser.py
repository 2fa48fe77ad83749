"""The sidebar tab Attention in a real browser, with answers that only a machine with a GPU would give."""

import json
import re

import pytest

from comfyui_attune.attention.policy import ERROR_BUDGET, KERNEL_NAMES
from comfyui_attune.kernels import KERNELS as PACK
from comfyui_attune.measure.palette import colour
from support.browser import ComfyPage
from support.browser_nodes import Desk
from support.loading import ROOT
from support.panel import (
    DEMOTED,
    KERNELS,
    MACHINE,
    PIP,
    REPEATED,
    Fake,
    Panel,
    contrast,
    kernel,
    listed,
    live,
    past,
    works,
)

MODULES = "/extensions/ComfyUI-Attune/panel"


@pytest.fixture(scope="module")
def shown(browser, server, tmp_path_factory):
    comfy = ComfyPage(browser, server, vue=True)  # test_panel_workflow.py has the panel beside both renderers
    comfy.context.grant_permissions(["clipboard-read", "clipboard-write"])
    comfy.page.set_default_timeout(60_000)
    comfy.page.set_viewport_size({"width": 1600, "height": 1500})
    panel = Panel(Desk(comfy, tmp_path_factory.mktemp("pictures")))
    panel.theme("dark")
    yield panel, Fake(comfy)
    panel.theme("dark")
    comfy.close()


@pytest.fixture
def panel(shown):
    """The tab, closed; `panel.fake` answers for the server."""
    panel, fake = shown
    panel.fake = fake
    before = dict(fake.answers)
    fake.asked.clear()
    yield panel
    fake.answers.clear()
    fake.answers.update(before)
    panel.close()
    assert panel.desk.problems == []


# The text of what has the keyboard's focus.
FOCUS = """() => {
    let one = document.activeElement;
    while (one?.shadowRoot?.activeElement) one = one.shadowRoot.activeElement;
    return one.innerText;
}"""


def readout(panel) -> str:
    return panel.section("live").locator(".readout").inner_text()


def test_machine_kernels_causes_and_cures(panel):
    panel.open()
    panel.width(420)
    lines = panel.section("machine").get_by_role("listitem").all_inner_texts()
    assert lines[:4] == MACHINE["lines"] and lines[4:5] == MACHINE["remarks"]
    rows = [row for row in panel.section("kernels").locator("tr[data-outcome]").all_inner_texts() if row]
    order = "sage3 flash2 sdpa_flash sdpa sub_quad flash4 attune_int8 sage2_fp8_cuda kitchen_int8"
    assert [row.split()[0] for row in rows] == order.split(), "what works comes first, the fastest first of all"
    assert rows[0].split() == ["sage3", "✓works", "0.21", "ms", "0.041"]
    assert "wrong numbers" in rows[5] and "0.31" in rows[5]
    why = panel.section("kernels").locator("tr.why", has_text="PyTorch 2.8")
    assert "Install the wheel that fits" in why.inner_text() and PIP in why.inner_text()
    why.get_by_role("button").click()
    assert panel.comfy.call("() => navigator.clipboard.readText()") == PIP
    assert "Copied" in why.inner_text()
    folded = panel.page.get_by_text("Not installed, or not for this machine (2)")
    assert not panel.page.get_by_text("pip install xformers").is_visible()
    folded.click()
    assert panel.page.get_by_text("pip install xformers").is_visible()
    panel.desk.screenshot("panel-kernels")


def test_probing_again_shows_its_progress_and_then_what_was_found(panel):
    panel.fake.answers["POST /attune/probe"] = (202, {"started": True, "total": 9})
    panel.fake.answers["/attune/kernels"] = {
        "kernels": [{**row, "status": row["outcome"] if row["name"] in ("xformers", "flash3") else row["status"]}
                    for row in KERNELS]
    }  # fmt: skip
    panel.open()
    panel.section("kernels").get_by_text("wrong numbers").wait_for()
    panel.button("Probe again").click()
    section = panel.section("kernels")
    section.get_by_text("Probing 0 of 9").wait_for()
    tried = [row["name"] for row in KERNELS if row["name"] not in ("xformers", "flash3", "sub_quad")]
    assert ("/attune/probe", {"kernels": tried}) in panel.fake.asked, "neither what cannot run nor what is ComfyUI's"
    told = {"done": 3, "total": 9, "kernel": "sage3", "outcome": "crashed", "ended": False}
    panel.fake.send("attune.probe", told)
    section.get_by_text("Probing 3 of 9: sage3").wait_for()
    assert section.get_by_role("progressbar").evaluate("bar => [bar.value, bar.max]") == [3, 9]
    panel.fake.answers["/attune/kernels"] = {"kernels": [works("sdpa", 0.5), kernel("sage3", "crashed", cause="Dead.")]}
    panel.fake.answers["/attune/machine"] = {**MACHINE, "remarks": ["sage3 died."]}
    panel.fake.send("attune.probe", {**told, "done": 9, "ended": True})
    section.get_by_text("Dead.").wait_for()
    panel.section("machine").get_by_text("sage3 died.").wait_for()
    assert not section.get_by_role("progressbar").is_visible()
    panel.fake.answers["POST /attune/probe"] = (409, {"error": "a prompt runs; kernels are tried when it is over"})
    panel.button("Probe again").click()
    section.get_by_role("alert").get_by_text("a prompt runs").wait_for()


def test_kernels_that_the_server_tries_by_itself_are_asked_for_until_all_are_tried(panel):
    asked = []
    looks = lambda request: asked.append(request.url.endswith("/attune/kernels"))  # noqa: E731
    panel.page.on("request", looks)
    try:
        panel.fake.answers["/attune/kernels"] = {"kernels": [kernel("sdpa", "open"), kernel("sage3", "open")]}
        panel.open()
        section = panel.section("kernels")
        section.get_by_text("not tried yet").first.wait_for()
        panel.fake.answers["/attune/kernels"] = {"kernels": [works("sdpa", 0.5), kernel("sage3", "open")]}
        panel.fake.answers["/attune/machine"] = {**MACHINE, "remarks": ["sdpa was tried."]}
        section.locator("tr[data-outcome=works]").wait_for(timeout=10_000)
        panel.section("machine").get_by_text("sdpa was tried.").wait_for()
        panel.close()
        before = sum(asked)
        panel.page.wait_for_timeout(3500)
        assert sum(asked) == before, "nobody looks"
        panel.fake.answers["/attune/kernels"] = {"kernels": [works("sdpa", 0.5), works("sage3", 0.2)]}
        panel.open()
        section.locator("tr[data-outcome=works]").nth(1).wait_for()
        panel.page.wait_for_timeout(3500)
        assert sum(asked) == before + 1, "there is nothing to wait for"
    finally:
        panel.page.remove_listener("request", looks)


def test_a_run_of_a_server_that_is_gone_is_not_shown_as_the_last_one(panel):
    panel.fake.answers["/attune/runs"] = {"runs": [listed(1)]}
    panel.fake.answers["/attune/runs/1"] = {**past(1, 61.2), "prompt_id": "p", "sampler_node": "57:3"}
    panel.open()
    live_one, runs = panel.section("live"), panel.section("runs")
    live_one.get_by_text("Run 1 · Wan 2.2 14B · #3 · 20 steps · finished · 61.2").wait_for()
    assert " · #3 · sage3 ×" in panel.page.get_by_label("Show", exact=True).locator("option").inner_text()
    panel.fake.answers["/attune/runs"] = {"runs": [{**listed(1), "prompt_id": "q"}]}
    panel.fake.answers["/attune/runs/1"] = {**past(1, 44.9), "prompt_id": "q"}
    panel.fake.send("reconnected", {})
    live_one.get_by_text("44.9").first.wait_for()
    panel.fake.answers["/attune/runs"] = {"runs": []}
    panel.fake.send("reconnected", {})
    live_one.get_by_text("Nothing has been sampled yet").wait_for()
    assert "Run 1" not in live_one.inner_text() and "No run yet" in runs.inner_text()


def test_the_map_while_sampling(panel):
    panel.open()
    panel.width(420)
    panel.until(lambda: panel.fake.asked)
    assert panel.fake.asked == [("/attune/watch", {"client_id": panel.comfy.call("app.api.clientId"), "on": True})]
    section = panel.section("live")
    assert "Nothing has been sampled yet" in section.inner_text()
    panel.fake.send("attune.live", live(4, full=True))
    section.get_by_text("Run 1 · Wan 2.2 14B · #3 · step 4 (of 0–19) · running").wait_for()
    section.locator("canvas").wait_for()
    panel.page.wait_for_timeout(200)
    first = panel.map_colours()
    assert first[colour("sage3")] > 1000 and first[colour("flash2")] > 1000 and colour("sdpa") not in first
    panel.fake.send("attune.live", live(9, events=[DEMOTED, REPEATED]))
    panel.page.wait_for_timeout(200)
    later = panel.map_colours()
    assert later[colour("sage3")] > first[colour("sage3")], "the map grows with the steps"
    rows = section.locator("table.figures tbody tr").all_inner_texts()
    assert [row.split() for row in rows] == [
        ["flash2", "160", "30", "%,", "3", "s", "–"],
        ["sage3", "648", "60", "%,", "6", "s", "0.041"],
        ["sdpa", "800", "10", "%,", "1", "s", "–"],
    ]
    log = section.get_by_role("log").inner_text()
    assert "Given up: sage3 gave NaN in self attention (step 7, block 23)" in log and "Repeated:" in log
    section.get_by_role("radio", name="Cross").click()
    panel.page.wait_for_timeout(100)
    assert colour("sage3") not in panel.map_colours() and panel.map_colours()[colour("sdpa")] > 1000
    section.get_by_role("radio", name="Self").click()
    panel.button("sdpa").first.click()
    panel.page.wait_for_timeout(100)
    assert colour("sage3") not in panel.map_colours(), "only sdpa keeps its colour"
    panel.button("sdpa").first.click()
    panel.desk.screenshot("panel-live")


def test_the_end_of_a_run_replaces_what_was_known_and_it_can_be_looked_back_at(panel):
    panel.open()
    panel.fake.send("attune.live", {**live(4, full=True), "run": 2})
    panel.fake.answers["/attune/runs"] = {"runs": [listed(1), listed(2)]}
    panel.fake.answers["/attune/runs/1"] = past(1, 61.2, fast=False)
    panel.fake.answers["/attune/runs/2"] = past(2, 44.9)
    end = {**live(19, full=True), "run": 2, "status": "finished", "kernels": ["sage3", "flash2", "sdpa"]}
    panel.fake.answers["/attune/machine"] = {**MACHINE, "remarks": ["sage3 was given up."]}
    panel.fake.send("attune.live", end)
    panel.section("machine").get_by_text("sage3 was given up.").wait_for()
    panel.section("live").get_by_text("44.9 s").wait_for()
    assert "Nothing is being sampled" in panel.section("live").inner_text()
    runs = panel.section("runs")
    assert "This run is shown above" in runs.inner_text()
    panel.page.get_by_label("Beside").select_option("1")
    runs.get_by_text("Run 1 took 61.2 s, 36 % more than run 2 (44.9 s).").wait_for()
    panel.width(800)
    panel.page.wait_for_timeout(300)
    table = runs.get_by_role("table", name="Side by side").inner_text()
    assert "16.8 s (60 %)" in table and "12 s (60 %)" in table
    left, right = runs.locator(".beside > .run").all()
    assert right.bounding_box()["x"] > left.bounding_box()["x"] + 300, "side by side where there is room"
    panel.desk.screenshot("panel-two-runs")
    panel.width(320)
    assert right.bounding_box()["x"] == left.bounding_box()["x"], "one below the other where there is none"
    panel.desk.screenshot("panel-narrow")


def test_the_map_by_keyboard_and_as_a_table(panel):
    panel.open()
    panel.fake.send("attune.live", live(9, full=True, events=[DEMOTED]))
    section = panel.section("live")
    section.locator("canvas").wait_for()
    plot = section.get_by_role("application")
    plot.focus()
    assert readout(panel) == "Step 0, block 0: self flash2 ×2"
    for _ in range(3):
        panel.page.keyboard.press("ArrowRight")
    panel.page.keyboard.press("ArrowDown")
    assert readout(panel) == "Step 3, block 1: self sage3 ×2"
    panel.page.keyboard.press("End")
    assert readout(panel) == "Step 19, block 1: no call yet"
    for _ in range(60):
        panel.page.keyboard.press("ArrowDown")
    assert readout(panel) == "Step 19, block 39: no call yet"
    # The Vue renderer and the canvas have shortcuts of one letter; keys in the panel are the panel's.
    panel.page.keyboard.press("w")
    assert panel.section("live").is_visible()
    panel.page.keyboard.press("Tab")
    for _ in range(8):
        if panel.comfy.call(FOCUS) == "The map as a table":
            break
        panel.page.keyboard.press("Tab")
    panel.page.keyboard.press("Enter")
    section.locator("table.plain").wait_for()
    rows = [row.split("\t") for row in section.locator("table.plain tbody tr").all_inner_texts()]
    assert rows == [
        ["0–1", "0–39", "self", "flash2"],
        ["0–1", "0–39", "cross", "sdpa"],
        ["2–9", "1–38", "self", "sage3"],
        ["2–9", "0, 39", "self", "flash2"],
        ["2–9", "0–39", "cross", "sdpa"],
    ]
    panel.page.keyboard.press("Enter")
    assert not section.locator("table.plain").is_visible()


def test_everything_can_be_reached_with_tab_and_has_a_name(panel):
    panel.fake.answers["/attune/runs"] = {"runs": [listed(1), listed(2)]}
    panel.fake.answers["/attune/runs/1"] = past(1, 61.2, fast=False)
    panel.fake.answers["/attune/runs/2"] = past(2, 44.9)
    panel.open()
    panel.section("live").locator("canvas").wait_for()
    panel.section("machine").locator("summary").focus()
    reached = []
    look = """() => {
        let one = document.activeElement;
        while (one?.shadowRoot?.activeElement) one = one.shadowRoot.activeElement;
        const style = getComputedStyle(one);
        const name = one.getAttribute('aria-label') || one.labels?.[0]?.innerText || one.innerText || one.title || '';
        const inside = one.getRootNode() !== document;
        const of = one.type === 'radio' ? getComputedStyle(one.nextElementSibling) : style;
        return [inside, one.tagName, name.trim(), of.outlineStyle !== 'none' && parseFloat(of.outlineWidth) >= 2];
    }"""
    for _ in range(40):
        panel.page.keyboard.press("Tab")
        inside, tag, name, outlined = panel.comfy.call(look)
        if not inside:
            break
        reached.append(name)
        assert name, f"{tag} after {reached} has no name"
        assert outlined, f"{tag} {name} shows no focus"
    for wanted in ("Benchmark this model", "Copy the doctor's bundle", "Bypass all", "Self", "sage3", "Show", "Beside"):
        assert wanted in reached, reached
    assert any(name.startswith("Map of blocks") for name in reached) and "Probe again" in reached
    assert "Save the report of run 2 as PNG" in reached, reached


def test_five_updates_a_second_change_only_what_is_new(panel):
    panel.open()
    panel.fake.send("attune.live", live(3, full=True))
    panel.section("live").locator("canvas").wait_for()
    panel.page.wait_for_timeout(200)
    events = [live(step) for step in range(4, 16)]
    added, moved, worst = panel.comfy.call(
        """async (events) => {
            const root = [...document.querySelectorAll('.side-bar-panel *')].find(one => one.shadowRoot).shadowRoot;
            const below = root.querySelector('[data-section=runs]');
            const top = () => below.getBoundingClientRect().top;
            const [before, frame] = [top(), () => new Promise(done => requestAnimationFrame(done))];
            let [nodes, worst] = [[], 0];
            const watcher = new MutationObserver(all => {
                const added = all.flatMap(one => [...one.addedNodes]).filter(node => node.nodeType === 1);
                nodes.push(...added.map(node => node.outerHTML));
            });
            watcher.observe(root.querySelector('[data-section=live]'), { childList: true, subtree: true });
            for (const detail of events) {
                app.api.dispatchEvent(new CustomEvent('attune.live', { detail }));
                const start = performance.now();
                await frame();
                worst = Math.max(worst, performance.now() - start);
                await new Promise(done => setTimeout(done, 20));
            }
            await frame();
            watcher.disconnect();
            return [nodes, top() - before, worst];
        }""",
        events,
    )
    assert added == [], "axes, rows and lines are changed in place"
    assert moved == 0, "nothing below the map moves"
    assert worst < 500, "milliseconds for one update, on a machine without a GPU that others use too"


def test_a_panel_that_is_closed_asks_for_nothing(panel):
    def watched() -> list[bool]:
        return [body["on"] for path, body in panel.fake.asked if path == "/attune/watch"]

    panel.open()
    panel.until(lambda: watched() == [True])
    panel.close()
    panel.until(lambda: watched() == [True, False])
    panel.fake.send("attune.live", {**live(4, full=True), "run": 70})
    panel.open()
    panel.until(lambda: watched() == [True, False, True])
    assert "Run 70" not in panel.section("live").inner_text()
    panel.fake.send("attune.live", {**live(4, full=True), "run": 71})
    panel.section("live").get_by_text("Run 71").wait_for()
    panel.close()
    panel.open()
    assert "Run 71" not in panel.section("live").inner_text(), "nobody knows whether it still goes on"
    panel.fake.asked.clear()
    panel.close()
    panel.open()
    panel.until(lambda: watched() == [False, True])
    set_to = "(on) => app.extensionManager.setting.set('Attune.LiveMap', on)"
    panel.comfy.call(set_to, False)
    try:
        panel.section("live").get_by_text("The live map is off").wait_for()
        panel.until(lambda: watched() == [False, True, False])
    finally:
        panel.comfy.call(set_to, True)
    panel.until(lambda: watched() == [False, True, False, True])


def test_each_error_says_what_to_do(panel):
    panel.fake.answers["/attune/kernels"] = (500, {"error": "the disk is full"})
    panel.fake.answers["/attune/machine"] = (404, "404: Not Found")
    panel.fake.answers["/attune/runs"] = {"runs": [listed(7)]}
    panel.fake.answers["/attune/bundle"] = "{}"
    panel.open()
    panel.section("kernels").get_by_role("alert").get_by_text("the disk is full (/attune/kernels, HTTP 500)").wait_for()
    assert "Restart ComfyUI" in panel.section("machine").get_by_role("alert").inner_text()
    assert "Run 7 is no longer kept" in panel.section("runs").get_by_role("alert").inner_text()
    panel.desk.screenshot("panel-errors")
    panel.fake.answers["/attune/kernels"] = {"kernels": KERNELS}
    panel.section("kernels").get_by_role("button", name="Try again").click()
    panel.section("kernels").get_by_text("wrong numbers").wait_for()
    panel.section("kernels").get_by_role("alert").wait_for(state="hidden")
    panel.button("Copy the doctor's bundle").click()
    panel.section("tools").get_by_text("Copied.").wait_for()
    assert panel.comfy.call("() => navigator.clipboard.readText()") == "{}"


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_texts_can_be_read_in_both_themes(panel, theme):
    panel.fake.answers["/attune/runs"] = {"runs": [listed(2)]}
    panel.fake.answers["/attune/runs/2"] = past(2, 44.9)
    panel.theme(theme)
    panel.open()
    panel.section("live").locator("canvas").wait_for()
    panel.width(420)
    seen = panel.comfy.call(
        """() => {
            const root = [...document.querySelectorAll('.side-bar-panel *')].find(one => one.shadowRoot).shadowRoot;
            const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
            const paint = (...colours) => { // one over the other, as the browser does
                canvas.clearRect(0, 0, 1, 1);
                for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1) }
                return [...canvas.getImageData(0, 0, 1, 1).data];
            };
            const found = [];
            for (const one of root.querySelectorAll('p, li, th, td, h2, h3, button, select, span')) {
                const text = [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim());
                if (!text || !one.checkVisibility()) continue;
                const behind = [];
                for (let up = one; up; up = up.parentElement ?? up.getRootNode().host)
                    behind.unshift(getComputedStyle(up).backgroundColor);
                const ground = paint(...behind);
                found.push([one.innerText.slice(0, 40), paint(...behind, getComputedStyle(one).color), ground]);
            }
            return found;
        }"""
    )
    assert len(seen) > 40
    poor = {text: round(contrast(ink, paper), 1) for text, ink, paper in seen if contrast(ink, paper) < 4.5}
    assert not poor
    panel.desk.screenshot(f"panel-{theme}")


def test_a_new_node_begins_with_the_settings_and_a_workflow_keeps_its_own(panel):
    chosen = {"Attune.DefaultKernel": "sdpa", "Attune.ErrorBudget": 0.2, "Attune.WhenUnavailable": "error"}
    usual = {"Attune.DefaultKernel": "auto", "Attune.ErrorBudget": ERROR_BUDGET, "Attune.WhenUnavailable": "fallback"}
    put = (
        "(values) => { for (const [id, value] of Object.entries(values)) app.extensionManager.setting.set(id, value) }"
    )
    assert panel.comfy.call("(ids) => ids.map(id => app.extensionManager.setting.get(id))", list(usual)) == list(
        usual.values()
    )
    panel.comfy.call(put, chosen)
    try:
        values = panel.comfy.call(
            """async () => {
                const of = (node) => Object.fromEntries(node.widgets.map(w => [w.name, w.value]));
                await app.loadGraphData({ nodes: [], links: [], version: 0.4, last_node_id: 0, last_link_id: 0 });
                const made = LiteGraph.createNode("AttentionSelector");
                app.graph.add(made);
                const rule = LiteGraph.createNode("AttentionRule");
                app.graph.add(rule);
                await Promise.resolve();
                const fresh = of(made);
                for (const one of made.widgets) if (one.name === "kernel") one.value = "split";
                const copy = made.clone();
                app.graph.add(copy);
                await Promise.resolve();
                const saved = app.graph.serialize();
                saved.nodes[0].widgets_values = ["auto"]; // from before there were other widgets
                await app.loadGraphData(saved);
                const loaded = of(app.graph.nodes.find(node => node.id == saved.nodes[0].id));
                await app.loadApiJson({ 1: { class_type: "AttentionSelector", inputs: { kernel: "host" } } }, "x");
                await Promise.resolve();
                return [fresh, of(rule), of(copy), loaded, of(app.graph.nodes[0])];
            }"""
        )
    finally:
        panel.comfy.call(put, usual)
    fresh, rule, copied, loaded, api = values
    assert (fresh["kernel"], fresh["error_budget"], fresh["when_unavailable"]) == ("sdpa", 0.2, "error")
    assert rule["kernel"] == "sdpa"
    assert copied["kernel"] == "split"
    assert (loaded["kernel"], loaded["error_budget"], loaded["when_unavailable"]) == ("auto", 0.05, "fallback")
    assert (api["kernel"], api["error_budget"], api["when_unavailable"]) == ("host", 0.05, "fallback")


def test_what_the_page_knows_is_what_the_pack_knows(panel):
    names = [one.name for one in PACK] + ["host", "sub_quad", "basic", "somebody's_own", "x"]
    found = panel.comfy.call(
        "async ([modules, names]) => names.map((await import(`${modules}/palette.js`)).colour)", [MODULES, names]
    )
    assert found == [colour(name) for name in names]
    listed_there = panel.comfy.call("async (modules) => (await import(`${modules}/settings.js`)).KERNELS", MODULES)
    assert listed_there == KERNEL_NAMES


def test_very_many_steps_and_blocks_share_the_cells_of_the_map(panel):
    found = panel.comfy.call(
        """async (modules) => {
            const { Run } = await import(`${modules}/run.js`);
            const run = new Run();
            const cells = [];
            for (let step = 10; step < 460; step++)
                for (let block = 0; block < 150; block++) cells.push([step, block, "self", step < 460 - 6 ? 0 : 1, 2]);
            cells.push([10, null, "cross", 1, 7]);
            const about = { run: 1, status: "running", first_step: 10, steps: 450, blocks: 150, kernels: ["a", "b"] };
            run.update({ ...about, full: true, cells });
            const grid = run.grid();
            const plain = (cell) => cell && [...cell].map(([kind, counts]) => [kind, [...counts]]);
            const sizes = [grid.columns, grid.columnsOf, grid.rows.length, grid.rowsOf];
            return [sizes, plain(grid.at(0, 0)), plain(grid.at(74, 149)), plain(grid.at(75, 0)), plain(grid.at(75, 1))];
        }""",
        MODULES,
    )
    sizes, first, last, outside, none = found
    assert sizes == [150, 3, 76, 2], "three steps to a column, two blocks to a row, and a row for calls outside blocks"
    assert first == [["self", [["a", 12]]]] and last == [["self", [["b", 12]]]]
    assert outside == [["cross", [["b", 7]]]] and none is None


def test_every_text_has_an_id_and_every_id_a_use():
    english = (ROOT / "web" / "panel" / "text.js").read_text("utf-8")
    ids = set(re.findall(r'^  "?([\w .]+)"?:', english.split("ENGLISH = {")[1].split("\n};")[0], re.MULTILINE))
    code = "".join(path.read_text("utf-8") for path in sorted((ROOT / "web").rglob("*.js")) if path.name != "text.js")
    used = set(re.findall(r'["`]((?:\w+)\.[\w. ]+)["`]', code)) | {"title", "tooltip"}
    made = re.findall(r"t\(`(\w+(?:\.\w+)?)\.\$\{", code)  # the rest of the id is a value
    used |= {one for one in ids if any(one.startswith(f"{start}.") for start in made)}
    assert set(re.findall(r'(?<![\w.])t\(\s*"([\w. ]+)"', code)) <= ids
    assert ids <= used, ids - used


def test_a_language_file_gives_the_words(panel):
    """As ComfyUI serves it: locales/zh/main.json of a pack, with the panel's words under "attune"."""
    found = panel.comfy.call(
        """async (modules) => {
            const { chooseLanguage, t } = await import(`${modules}/text.js`);
            const { setting } = app.extensionManager;
            const [get, fetchApi] = [setting.get, app.api.fetchApi];
            setting.get = (id) => id === "Comfy.Locale" ? "zh" : get(id);
            const file = { zh: { attune: { "run.number": "第{number}次" } } };
            app.api.fetchApi = async () => new Response(JSON.stringify(file));
            try {
                await chooseLanguage();
                const said = [t("run.number", { number: 3 }), t("runs.title")];
                app.api.fetchApi = async () => { throw new Error("away") };
                await chooseLanguage();
                return [...said, t("run.number", { number: 3 })];
            } finally {
                [setting.get, app.api.fetchApi] = [get, fetchApi];
                await chooseLanguage();
            }
        }""",
        MODULES,
    )
    assert found == ["第3次", "Last runs", "Run 3"]


def test_the_panel_costs_a_page_that_does_not_show_it_little(panel):
    """The charts' library is fetched when the tab is opened first, and nothing is asked of the server before."""
    listing = panel.comfy.call("async () => (await app.api.fetchApi('/extensions')).json()")
    ours = [name for name in listing if "ComfyUI-Attune" in name]
    assert ours and not any("vendor" in name for name in ours)
    size = sum((ROOT / "web" / name.split("ComfyUI-Attune/")[1]).stat().st_size for name in ours)
    assert size < 135_000
    assert json.loads((ROOT / "web" / "tsconfig.json").read_text("utf-8"))["compilerOptions"]["checkJs"]
