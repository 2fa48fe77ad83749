"""The panel, its commands and the nodes' badges on real workflows, in both renderers, with the pack's own routes."""

import json

import pytest

from comfyui_attune.graphs.kinds import ATTENTION
from support.workflows import BYPASSED, SELECTORS, SWITCHES

T2V = "wan2.2_t2v_14b"
HIGH, LOW = SELECTORS


# The tooltip of the badge on the node `id`, and the colour around it.
BADGE = """(id) => {
    const face = app.canvas.graph.nodes.find(n => n.id == id).widgets.find(w => w.name === "attune_status").element;
    const badge = face.shadowRoot.querySelector(".kernel");
    return [badge.title, getComputedStyle(badge.querySelector(".chip")).borderTopColor];
}"""


def test_a_run_is_seen_while_it_goes_on_and_afterwards(panel, desk):
    desk.open(T2V)
    panel.open()
    panel.width(420)
    desk.comfy.call(
        """() => {
            window.lives = [];
            app.api.addEventListener("attune.live", ({ detail }) => window.lives.push(structuredClone(detail)));
        }"""
    )
    panel.until(lambda: desk.comfy.call("async () => (await app.api.fetchApi('/attune/probe')).ok"))
    desk.set(HIGH, kernel="sdpa")
    desk.set(LOW, kernel="sage3")
    desk.look_at(HIGH, LOW)
    run = desk.run()
    last = run.runs[-1]
    section = panel.section("live")
    section.get_by_text(f"Run {last['run']} · ").wait_for()
    section.get_by_text("not sage3").wait_for()
    assert " · finished" in section.locator(".about").inner_text()
    told = [(event["run"], event["status"]) for event in desk.comfy.call("window.lives")]
    assert (last["run"], "finished") in told and (run.runs[0]["run"], "finished") in told
    names = section.locator("table.figures tbody tr").all_inner_texts()
    assert [row.split()[:2] for row in names] == [[name, str(count)] for name, count in last["observed"].items()]
    assert "not sage3 ×8: " in section.get_by_role("log").inner_text()
    panel.section("runs").get_by_text("This run is shown above").wait_for()
    panel.page.get_by_label("Beside").select_option(str(run.runs[0]["run"]))
    panel.section("runs").locator(".beside > .run").nth(1).wait_for()
    panel.section("runs").get_by_role("table", name="Side by side").wait_for()
    desk.screenshot("panel-after-a-run")
    for name, holds in (("Text", b"sampler node 58"), ("JSON", b'"kind": "attune run"'), ("PNG", b"\x89PNG")):
        with desk.page.expect_download() as saved:
            panel.button(f"Save the report of run {last['run']} as {name}").click()
        path = saved.value.path()
        assert holds in path.read_bytes() and saved.value.suggested_filename.startswith("attune-run-")
    # The badges on the nodes: red where it was not what was asked, with the reason on hover.
    assert desk.chips(LOW) == ["host!"] and desk.chips(HIGH) == ["sdpa"]
    title, colour = desk.comfy.call(BADGE, LOW)
    reason = last["nodes"][str(LOW)]["refused"][0]["reasons"][0]
    assert "not what was asked for" in title and "Asked for: sage3." in title and f"Not sage3: {reason}" in title
    assert colour == "rgb(229, 50, 45)"
    title, plain = desk.comfy.call(BADGE, HIGH)
    assert "not what" not in title and plain != colour


def test_all_attention_nodes_are_bypassed_and_enabled_at_once_and_undone(panel, desk):
    desk.open(T2V)
    desk.click(LOW)
    desk.comfy.call("() => app.canvas.graph.convertToSubgraph(app.canvas.selectedItems)")
    desk.settle()
    modes = """() => {
        const found = {};
        const look = (graph) => {
            for (const node of graph.nodes) {
                if (node.subgraph) look(node.subgraph);
                else if (/Attention|Sage3|Release/.test(node.type)) found[`${node.type} ${node.title}`] = node.mode;
            }
        };
        look(app.rootGraph ?? app.graph);
        return found;
    }"""
    before = desk.comfy.call(modes)
    selectors = [name for name in before if name.startswith("AttentionSelector")]
    assert len(selectors) == 2 and all(before[name] == 0 for name in selectors)
    desk.comfy.call("() => app.extensionManager.command.execute('Attune.BypassAll')")
    desk.page.get_by_text("Bypassed attention nodes: 2.").first.wait_for()
    assert all(desk.comfy.call(modes)[name] == BYPASSED for name in selectors), "also the one in the subgraph"
    assert not any(node["class_type"] == "AttentionSelector" for node in desk.comfy.prompt().values())
    desk.comfy.call("async () => app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    desk.settle()
    assert desk.comfy.call(modes) == before, "one step back undoes it"
    for command in ("BypassAll", "EnableAll"):
        desk.comfy.call(f"() => app.extensionManager.command.execute('Attune.{command}')")
        desk.settle()
    assert desk.comfy.call(modes) == before, "what was bypassed before stays so"
    panel.open()
    panel.button("Enable all").click()
    desk.page.get_by_text(f"Enabled attention nodes: {len(SWITCHES)}.").first.wait_for()
    after = desk.comfy.call(modes)
    assert all(mode == 0 for name, mode in after.items() if not name.startswith("ReleaseModel"))
    assert {name: mode for name, mode in after.items() if name.startswith("ReleaseModel")} == {
        name: mode for name, mode in before.items() if name.startswith("ReleaseModel")
    }
    panel.button("Enable all").click()
    desk.page.get_by_text("Nothing to enable").first.wait_for()


def test_the_nodes_are_those_of_the_command_line_and_what_is_muted_stays_so(desk):
    """Other packs' nodes too: who bypasses all wants the model as ComfyUI itself runs it."""
    types = desk.comfy.call(
        "async () => (await import('/extensions/ComfyUI-Attune/panel/nodes.js')).ATTENTION",
    )
    assert sorted(types) == sorted(ATTENTION)
    modes = desk.comfy.call(
        """async (types) => {
            const nodes = [...types, "AttentionReport", "ReleaseModel"].map((type, at) => ({
                id: at + 1, type, pos: [0, 80 * at], size: [200, 60], flags: {}, order: at, mode: at === 1 ? 2 : 0,
                inputs: [], outputs: [], properties: {},
            }));
            await app.loadGraphData({ nodes, links: [], version: 0.4, last_node_id: 99, last_link_id: 0 });
            const found = [];
            const look = () => found.push(Object.fromEntries(app.graph.nodes.map(one => [one.type, one.mode])));
            for (const command of ["BypassAll", "EnableAll"]) {
                await app.extensionManager.command.execute(`Attune.${command}`);
                look();
            }
            return found;
        }""",
        types,
    )
    rest = {"AttentionReport": 0, "ReleaseModel": 0}
    muted = {types[1]: 2}
    assert modes == [dict.fromkeys(types, BYPASSED) | rest | muted, dict.fromkeys(types, 0) | rest | muted]


def open_edit_menu(desk) -> None:
    """Open ComfyUI's menu and its "Edit". The menu may be too busy to see the pointer come: then it comes again."""
    desk.page.locator(".comfy-menu-button-wrapper").click()
    ours = desk.page.get_by_role("menuitem", name="Enable all attention nodes")
    for _ in range(40):
        desk.page.get_by_role("menuitem", name="Edit").first.hover()
        desk.page.wait_for_timeout(1000)
        if ours.is_visible():
            return
        desk.page.mouse.move(900, 900)
    raise AssertionError("the Edit menu does not show our commands")


def test_the_commands_are_in_the_menu(desk):
    desk.open(T2V)
    found = desk.comfy.call(
        """() => {
            const { commands } = app.extensionManager.command;
            return commands.filter(one => one.id.startsWith("Attune.")).map(one => [one.id, one.label]);
        }"""
    )
    assert [list(one) for one in found] == [
        ["Attune.BypassAll", "Bypass all attention nodes"],
        ["Attune.EnableAll", "Enable all attention nodes"],
    ]
    open_edit_menu(desk)
    desk.screenshot("panel-menu")
    desk.page.get_by_role("menuitem", name="Bypass all attention nodes").click()
    desk.page.get_by_text("Bypassed attention nodes: 2.").first.wait_for()
    assert desk.mode(HIGH) == desk.mode(LOW) == BYPASSED


@pytest.mark.parametrize("desk_page", [False], ids=["canvas"], indirect=True)  # nothing of it is the renderer's
def test_the_model_of_the_open_workflow_is_benchmarked(panel, desk):
    """As the button does, but for less long: what it sends is seen, and goes on with a shorter time."""
    desk.open(T2V)
    desk.look_at(HIGH, LOW)
    desk.run()
    faces = desk.shows(HIGH), desk.shows(LOW)
    sent = []

    def shorter(route) -> None:
        body = json.loads(route.request.post_data)
        sent.append(json.loads(route.request.post_data)["prompt"])
        body["prompt"]["attune_benchmark"]["inputs"] |= {"seconds": 0.1, "kernels": "exact"}
        route.continue_(post_data=json.dumps(body))

    desk.page.route("**/api/prompt", shorter)
    try:
        panel.open()
        panel.button("Benchmark this model").click()
        choice = desk.page.get_by_label("Benchmark the model of which sampler?")
        options = choice.locator("option").all_inner_texts()
        assert [option.split("#")[-1] for option in options] == ["57", "58"]
        choice.select_option(label=options[1])
        panel.button("Start").click()
        section = panel.section("tools")
        section.get_by_text("The benchmark is done.").wait_for(timeout=60_000)
        assert "sdpa" in section.locator("pre").inner_text()
        picture = section.get_by_role("img")
        panel.until(lambda: picture.evaluate("one => one.complete && one.naturalWidth > 300"))
        desk.screenshot("panel-benchmark")
    finally:
        desk.page.unroute("**/api/prompt")
    (prompt,) = sent
    made = prompt["attune_benchmark"]
    assert made["class_type"] == "AttentionBenchmark" and made["inputs"]["shapes"] == "from the model"
    classes = {node["class_type"] for node in prompt.values()}
    assert not any("Sampler" in name and "ModelSampling" not in name for name in classes), "nothing is sampled for it"
    assert "VAEDecode" not in classes and prompt[made["inputs"]["latent"][0]]["class_type"] == "EmptyHunyuanLatentVideo"
    assert (desk.shows(HIGH), desk.shows(LOW)) == faces, "the nodes show the last sampling still"


def test_a_benchmark_that_comfyui_refuses_says_why(panel, desk):
    desk.open(T2V)
    desk.look_at(58)
    desk.click(58)  # then nobody asks which sampler is meant
    panel.open()
    wrong = {"type": "value_not_in_list", "message": "Value not in list", "details": "unet_name: 'x' not in []"}
    answer = {"error": {"message": "Prompt outputs failed validation"}, "node_errors": {"37": {"errors": [wrong]}}}
    sent = []

    def refuse(route) -> None:
        sent.append(json.loads(route.request.post_data)["prompt"]["attune_benchmark"])
        route.fulfill(status=400, json=answer)

    desk.page.route("**/api/prompt", refuse)
    try:
        panel.button("Benchmark this model").click()
        told = panel.section("tools").get_by_role("alert")
        told.get_by_text("ComfyUI did not take the benchmark: Value not in list: unet_name: 'x' not in [].").wait_for()
    finally:
        desk.page.unroute("**/api/prompt")
    assert len(sent) == 1


def test_samplers_of_all_kinds_are_found_and_their_negatives_only_where_they_count(desk):
    found = desk.comfy.call(
        """async () => {
            const { samplers, benchmarkPrompt } = await import("/extensions/ComfyUI-Attune/panel/benchmark.js");
            const types = (name) => {
                const { input, output } = LiteGraph.registered_node_types[name].nodeData;
                const all = Object.entries({ ...input.required, ...input.optional });
                const inputs = Object.fromEntries(all.map(([key, spec]) => [key, String(spec[0])]));
                return { inputs, outputs: output.map(String) };
            };
            const k = { positive: ["p", 0], negative: ["n", 0], latent_image: ["l", 0] };
            const prompt = {
                m: { class_type: "UNETLoader", inputs: {} },
                p: { class_type: "CLIPTextEncode", inputs: {} },
                n: { class_type: "CLIPTextEncode", inputs: {} },
                l: { class_type: "EmptyLatentImage", inputs: {} },
                c: { class_type: "PrimitiveFloat", inputs: { value: 1 } },
                a: { class_type: "KSampler", inputs: { ...k, model: ["m", 0], cfg: 1 } },
                b: { class_type: "KSampler", inputs: { ...k, model: ["m", 0], cfg: ["c", 0], latent_image: ["a", 0] } },
                d: { class_type: "KSampler", inputs: { ...k, model: ["m", 0], cfg: 5 } },
                g: { class_type: "BasicGuider", inputs: { model: ["m", 0], conditioning: ["p", 0] } },
                e: { class_type: "SamplerCustomAdvanced", inputs: { guider: ["g", 0], latent_image: ["l", 0] } },
                x: { class_type: "KSampler", inputs: { latent_image: ["l", 0] } },
            };
            const all = samplers(prompt, types);
            const made = benchmarkPrompt(prompt, all.find(one => one.node === "b"), types);
            return [all, Object.keys(made).sort(), made.attune_benchmark.inputs.latent];
        }"""
    )
    samplers, nodes, latent = found
    negatives = {one["node"]: one["negative"] for one in samplers}
    assert negatives == {"a": None, "b": None, "d": ["n", 0], "e": None}
    assert all(one["model"] == ["m", 0] and one["positive"] == ["p", 0] for one in samplers)
    assert nodes == ["attune_benchmark", "l", "m", "p"] and latent == ["l", 0]


def test_without_a_sampler_there_is_nothing_to_benchmark(panel, desk):
    desk.comfy.call("async () => { await app.loadGraphData({ nodes: [], links: [], version: 0.4 }) }")
    panel.open()
    panel.button("Benchmark this model").click()
    panel.section("tools").get_by_role("alert").get_by_text("No model to benchmark was found").wait_for()


def test_the_bundle_is_copied_whole(panel, desk):
    desk.comfy.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel.open()
    panel.button("Copy the doctor's bundle").click()
    panel.section("tools").get_by_text("Copied.").wait_for()
    text = desk.comfy.call("() => navigator.clipboard.readText()")
    assert {"kernels", "remarks"} <= json.loads(text).keys()
