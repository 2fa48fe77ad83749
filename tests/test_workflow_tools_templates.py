"""`attune workflow` on the official templates: put in, loaded by the front end, run, taken out again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from attune_devtools import CACHE
from comfyui_attune import cli
from comfyui_attune.graphs import edit, files, text
from comfyui_attune.graphs.api import ApiBook
from comfyui_attune.graphs.book import Book
from comfyui_attune.measure.workflow_convert import to_api
from comfyui_attune.measure.workflow_file import WorkflowError
from support.server import find_nodes, shrink
from support.workflows import read

PACKAGE = "comfyui_workflow_templates_json"
FAMILIES = ("wan", "flux", "qwen", "hunyuan")


def templates() -> dict[str, Path]:
    """The workflows of the four families by name; none where the package is not there."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        return {}
    folder = Path(next(iter(package.submodule_search_locations))) / "templates"
    found = {path.stem: path for path in sorted(folder.glob("*.json"))}
    return {name: path for name, path in found.items() if any(family in name.lower() for family in FAMILIES)}


TEMPLATES = templates()


def samples_here(path: Path) -> bool:
    """Not the ones that only send the work to a service."""
    return any(edit.rows(Book(files.read(path).workflow)))


LOCAL = {name: path for name, path in TEMPLATES.items() if samples_here(path)}


@pytest.fixture(autouse=True)
def _needs_templates():
    if not TEMPLATES:
        pytest.skip(f"needs the package {PACKAGE}, which comes with ComfyUI")


def inserted(path: Path, kernel: str = "auto") -> dict:
    workflow = json.loads(path.read_text("utf-8"))
    edit.insert(Book(workflow), kernel)
    return workflow


def graphs(workflow: dict) -> list[dict]:
    return [workflow, *(workflow.get("definitions") or {}).get("subgraphs", [])]


def test_there_are_many():
    assert len(LOCAL) >= 20
    assert {family for family in FAMILIES for name in LOCAL if family in name.lower()} == set(FAMILIES)
    assert sum(bool(len(graphs(files.read(path).workflow)) > 1) for path in LOCAL.values()) >= 5


@pytest.mark.parametrize("name", LOCAL)
def test_in_and_out_again(name, tmp_path):
    path, given = tmp_path / "flow.json", LOCAL[name].read_bytes()
    path.write_bytes(given)
    assert cli.main(["workflow", "insert", str(path), "--kernel", "sdpa", "--no-backup"]) == 0
    document = files.read(path)
    rows = edit.rows(Book(document.workflow))
    assert rows and all(
        [one["type"] for one in row["attention"]].count("AttentionSelector") == 1 and row["on_every_way"]
        for row in rows
    )
    before = [{str(node["id"]): node for node in graph["nodes"]} for graph in graphs(json.loads(given))]
    for old, graph in zip(before, graphs(document.workflow), strict=True):
        nodes = {str(node["id"]): node for node in graph["nodes"]}
        assert {key: (node["pos"], node["size"], node["mode"]) for key, node in nodes.items() if key in old} == {
            key: (node["pos"], node["size"], node["mode"]) for key, node in old.items()
        }
        ends = [number for node in graph["nodes"] for out in node.get("outputs") or [] for number in out["links"] or []]
        assert len(set(ends)) == len(ends)
    assert cli.main(["workflow", "remove", str(path), "--no-backup"]) == 0
    assert path.read_bytes() == given


def meaning(prompt: dict, spliced: bool, values: bool = True) -> list[str]:
    """What a prompt computes, whatever its ids are: each node with all that it is made of.

    spliced: with the selectors left out. values: not only the links, but also what stands in widgets.
    """
    prompt = json.loads(json.dumps(prompt))
    if spliced:
        book = ApiBook(prompt)
        for node in find_nodes(prompt, "AttentionSelector"):
            assert "model" in prompt[node]["inputs"]
            book.root.take_out(node)
        book.write_back()
    known: dict[str, str] = {}

    def made_of(key: str) -> str:
        if key not in known:
            inputs = {
                name: [made_of(value[0]), value[1]] if isinstance(value, list) and value[0] in prompt else value
                for name, value in prompt[key]["inputs"].items()
                if values or isinstance(value, list)
            }
            whole = json.dumps([prompt[key]["class_type"], inputs], sort_keys=True)
            known[key] = hashlib.sha256(whole.encode()).hexdigest()
        return known[key]

    return sorted(map(made_of, prompt))


def known_to(server, workflow: dict) -> bool:
    """Has the server all the nodes that are sent?"""
    try:
        to_api(workflow, server.object_info())
    except WorkflowError:
        return False
    return True


def test_with_selectors_they_compute_the_same(server):
    seen = 0
    for name, path in LOCAL.items():
        original = json.loads(path.read_text("utf-8"))
        if known_to(server, original):
            before, after = to_api(original, server.object_info()), to_api(inserted(path), server.object_info())
            assert meaning(after, spliced=True) == meaning(before, spliced=False), name
            seen += bool(find_nodes(after, "AttentionSelector"))
    assert seen >= len(LOCAL) / 2


FIT = """() => {
    const nodes = app.canvas.graph.nodes
    const low = i => Math.min(...nodes.map(n => n.pos[i]))
    const high = i => Math.max(...nodes.map(n => n.pos[i] + n.size[i]))
    const scale = Math.min(1400 / (high(0) - low(0) + 200), 850 / (high(1) - low(1) + 200))
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [100 + 60 / scale - low(0), 100 + 60 / scale - low(1)]
    app.canvas.setDirty(true, true)
}"""
OPEN = """() => {
    const inside = app.graph.nodes.find(node => node.isSubgraphNode?.() && node.mode === 0)
    if (inside) app.canvas.setGraph(inside.subgraph)
}"""
PICTURES = ("image_to_video_wan", "video_wan2_2_14B_t2v", "video_wan2_2_14B_flf2v")


@pytest.mark.browser
def test_the_front_end_loads_them_and_sends_the_same_besides(open_page):
    page = open_page()
    seen, names = 0, dict.fromkeys([*PICTURES, "video_wan2_2_14B_s2v", *list(LOCAL)[1::4]])  # all take two minutes
    for name in [name for name in names if name in LOCAL]:
        page.load(json.loads(LOCAL[name].read_text("utf-8")))
        missing, before = page.node_types_missing(), page.prompt()
        changed = inserted(LOCAL[name])
        page.load(changed)
        assert page.node_types_missing() == missing, name
        if any(node["class_type"] is None for node in before.values()):
            continue  # nodes of other packs: the front end has no prompt to send
        after = page.prompt()
        assert meaning(after, spliced=True, values=False) == meaning(before, spliced=False, values=False), name
        active = [row for row in edit.rows(Book(changed)) if row["state"] == "active"]
        assert bool(find_nodes(after, "AttentionSelector")) is bool(active), name
        seen += 1
    assert seen >= len(LOCAL) / 8
    assert page.problems == []


# Nodes with widgets that only the front end has: a view of a model, options that the user wrote, boxes that he drew.
FRONT_END = ("3d_hunyuan3d-v2.1", "image_ideogram4_t2i", "api_ideogram_p_image_t2i", "templates_mjm_image_to_3d")


@pytest.mark.browser
def test_what_only_the_front_end_has_is_sent_as_it_does(open_page):
    page, seen = open_page(), 0
    folder = next(iter(TEMPLATES.values())).parent
    for path in [path for name in FRONT_END if (path := folder / f"{name}.json").exists()]:
        workflow = json.loads(path.read_text("utf-8"))
        page.load(workflow)
        if page.node_types_missing():
            continue
        wanted, found = page.prompt(), to_api(workflow, page.server.object_info())
        for node in wanted.values():
            if node["class_type"] in ("SaveGLB", "Preview3D"):
                node["inputs"].pop("image", None)  # what the view shows: no input of the server's
        assert {key: node["inputs"] for key, node in found.items()} == {
            key: node["inputs"] for key, node in wanted.items()
        }, path.name
        seen += 1
    assert seen >= 2
    assert page.problems == []


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_what_the_front_end_saves_has_the_selector_as_it_was_put_in(open_page, vue):
    page = open_page(vue=vue)
    for name in [name for name in PICTURES if name in LOCAL]:
        changed = inserted(LOCAL[name], "flash2")
        page.load(changed)
        saved = page.call("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
        for given, kept in zip(graphs(changed), graphs(saved), strict=True):
            new = {node["id"]: node for node in given["nodes"] if node["type"] == "AttentionSelector"}
            found = {int(node["id"]): node for node in kept["nodes"] if node["type"] == "AttentionSelector"}
            assert found.keys() == new.keys()
            for number, node in found.items():
                for key in ("pos", "mode", "inputs", "outputs", "widgets_values"):
                    assert node[key] == new[number][key], (name, key)
        page.call(OPEN)
        page.page.wait_for_timeout(300)
        page.call(FIT)
        page.page.wait_for_timeout(700)
        page.screenshot(CACHE / "screenshots" / f"inserted_{name}_{'vue' if vue else 'canvas'}.png")
    assert page.problems == []


# Runs on tiny models.


def saving_latents(prompt: dict) -> dict:
    """The prompt of a Wan template in the smallest size; it saves its latents instead of a video."""
    prompt = shrink(prompt, size=64, length=5, steps=2)
    for node in prompt.values():
        if "noise_seed" in node["inputs"] or "seed" in node["inputs"]:
            node["inputs"]["noise_seed" if "noise_seed" in node["inputs"] else "seed"] = 7
    (decode,) = find_nodes(prompt, "VAEDecode")
    end = {"samples": prompt[decode]["inputs"]["samples"], "filename_prefix": "latents/tools"}
    kept: dict = {"end": {"class_type": "SaveLatent", "inputs": end}}
    left = ["end"]
    while left:
        for value in kept[left.pop()]["inputs"].values():
            if isinstance(value, list) and value[0] not in kept:
                kept[value[0]] = prompt[value[0]]
                left.append(value[0])
    return kept


@pytest.mark.parametrize("name", ["video_wan2_2_14B_t2v", "video_wan2_2_14B_i2v"])
def test_a_wan_template_runs_with_its_selectors(name, server, tmp_path, capsys):
    from PIL import Image
    from safetensors.torch import load_file

    if name not in LOCAL:
        pytest.skip(f"this version of {PACKAGE} has no {name}")
    for picture in find_nodes(prompt := server.api(json.loads(LOCAL[name].read_text("utf-8"))), "LoadImage"):
        Image.new("RGB", (64, 64), "teal").save(server.base / "input" / prompt[picture]["inputs"]["image"])
    plain = server.run(saving_latents(server.api(json.loads(LOCAL[name].read_text("utf-8")))))
    assert plain.runs == []
    prompt = saving_latents(server.api(inserted(LOCAL[name], "sdpa_math")))
    path = tmp_path / "é flow.json"
    path.write_text(json.dumps(prompt), "utf-8")
    assert cli.main(["workflow", "run", str(path), "--server", server.url]) == 0
    said = capsys.readouterr().out
    assert said.startswith("success after") and "sdpa_math" in said
    runs = server.runs()[-2:]
    assert len(runs) == 2
    for run in runs:
        (node,) = run["nodes"].values()
        assert node["requested"] == "sdpa_math" and set(run["observed"]) == {"sdpa_math"}
    written = server.base / "output" / next(line for line in said.splitlines() if ".latent" in line).partition("/")[2]
    one, other = (load_file(file)["latent_tensor"] for file in (plain.files[0], written))
    assert (one - other).abs().max() <= 1e-3 * one.abs().max()


def test_what_a_run_saves_carries_the_workflow(server, tmp_path, capsys):
    flow = read("wan2.2_t2v_14b")
    for node in flow["nodes"]:
        if node["type"] == "EmptyHunyuanLatentVideo":
            node["widgets_values"] = [64, 64, 5, 1]
        elif node["id"] in (110, 111):
            node["widgets_values"][0] = 2 if node["id"] == 110 else 1
    path = tmp_path / "flow.json"
    path.write_text(text.dumps(flow, text.Style()), "utf-8")
    assert cli.main(["workflow", "run", str(path), "--server", server.url]) == 0
    said = capsys.readouterr()
    assert "KSamplerAdvanced (57)" in said.err and "auto" in said.out
    (name,) = [line for line in said.out.splitlines() if line.endswith(".mp4")]
    video = server.base / "output" / name.removeprefix("output/")
    assert files.read(video).workflow == flow
    assert cli.main(["workflow", "run", str(video), "--server", server.url]) == 0
    assert capsys.readouterr().out.startswith("success")


def test_a_run_that_cannot_be(server, tmp_path, capsys):
    path = tmp_path / "flow.json"
    path.write_text(json.dumps({"1": {"class_type": "NoSuchNode", "inputs": {}}}), "utf-8")
    assert cli.main(["workflow", "run", str(path), "--server", server.url]) == 2
    assert "does not accept" in capsys.readouterr().err
    flow = read("wan2.2_t2v_14b")
    flow["nodes"][0]["type"] = "NoSuchNode"
    path.write_text(json.dumps(flow), "utf-8")
    assert cli.main(["workflow", "run", str(path), "--server", server.url]) == 2
    assert "NoSuchNode" in capsys.readouterr().err
    assert cli.main(["workflow", "run", str(path), "--server", "http://127.0.0.1:9"]) == 2
    assert "no ComfyUI answers" in capsys.readouterr().err
