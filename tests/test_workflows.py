"""The workflows that ship with the pack: sound as files, known to a real server, and run by it on tiny models."""

import importlib.util
import itertools
import json
import re
import uuid
from pathlib import Path

import pytest

from support.server import find_nodes
from support.workflows import (
    ACTIVE,
    BYPASSED,
    CFG,
    LORAS,
    NAMES,
    ONE_STAGE,
    OURS,
    PATCHES,
    RELEASE,
    SELECTORS,
    START_IMAGE,
    SWITCHES,
    TITLE,
    TWO_STAGES,
    bounds,
    inside,
    latent,
    nodes_of,
    overlap,
    read,
    set_mode,
    small,
)

TEMPLATES = {
    "wan2.2_t2v_14b": "video_wan2_2_14B_t2v",
    "wan2.2_i2v_14b": "video_wan2_2_14B_i2v",
    "wan2.2_flf2v_14b": "video_wan2_2_14B_flf2v",
    "wan2.2_ti2v_5b": "video_wan2_2_5B_ti2v",
}
GAP = 20  # pixels: air for a taller node in the other renderer


def models_of(graph: dict) -> set[tuple[str, str, str]]:
    """(folder, file name, address) of every model that a UI workflow names, those inside subgraphs included."""
    graphs = [graph, *graph.get("definitions", {}).get("subgraphs", [])]
    found = (m for g in graphs for node in g["nodes"] for m in node.get("properties", {}).get("models", []))
    return {(model["directory"], model["name"], model["url"]) for model in found}


def box(node: dict) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def test_the_workflows_are_these_four():
    assert set(NAMES) == {*TWO_STAGES, ONE_STAGE}
    ids = [str(uuid.UUID(read(name)["id"])) for name in NAMES]
    assert len(set(ids)) == len(ids), "every workflow has an id of its own: results are shown on nodes by it"


@pytest.mark.parametrize("name", NAMES)
def test_every_link_has_both_ends(name):
    workflow = read(name)
    nodes = nodes_of(workflow)
    assert len(nodes) == len(workflow["nodes"]), "two nodes with one id"
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"]), "two links with one id"
    for number, source, output, target, slot, kind in links.values():
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert kind == nodes[source]["outputs"][output]["type"]
        assert nodes[target]["inputs"][slot]["type"] in (kind, "*")
    incoming = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None]
    outgoing = [number for node in nodes.values() for slot in node["outputs"] for number in slot["links"] or []]
    assert sorted(incoming) == sorted(outgoing) == sorted(links)
    assert workflow["last_node_id"] >= max(nodes) and workflow["last_link_id"] >= max(links)
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))
    reroutes = {reroute["id"]: reroute for reroute in workflow["extra"]["reroutes"]}
    for extension in workflow["extra"]["linkExtensions"]:
        at = extension["parentId"]
        while at is not None:
            assert extension["id"] in reroutes[at]["linkIds"]
            at = reroutes[at].get("parentId")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps_and_every_node_is_in_one_group(name):
    workflow = read(name)
    for one, other in itertools.combinations(workflow["nodes"], 2):
        left, top, right, bottom = box(one)
        assert not overlap((left, top, right + GAP, bottom + GAP), box(other)), (one["id"], other["id"])
    for one, other in itertools.combinations(workflow["groups"], 2):
        assert not overlap(bounds(one), bounds(other)), (one["title"], other["title"])
    for node in workflow["nodes"]:
        around = [group["title"] for group in workflow["groups"] if inside(box(node), bounds(group))]
        assert len(around) == 1, (node["type"], node["id"], around)


@pytest.mark.parametrize("name", NAMES)
def test_the_ids_that_people_know_and_titles_that_name_the_branch(name):
    nodes = nodes_of(read(name))
    branches = ("High noise: ", "Low noise: ") if name in TWO_STAGES else ("",)
    for branch, selector, switch in zip(branches, SELECTORS, SWITCHES, strict=False):
        assert nodes[selector]["type"] == "AttentionSelector" and nodes[switch]["type"] == "Sage3Switch"
        for number in (selector, switch):
            assert nodes[number].get("title", "").startswith(branch)
    assert sum(node["type"] in PATCHES for node in nodes.values()) == 2 * len(branches)
    if name in TWO_STAGES:
        assert nodes[RELEASE]["type"] == "ReleaseModel" and nodes[RELEASE]["title"].startswith("High noise: ")


@pytest.mark.parametrize("name", NAMES)
def test_only_sage3_and_the_options_are_bypassed(name):
    modes = {number: node["mode"] for number, node in nodes_of(read(name)).items() if node["mode"] != 0}
    expected = {*SWITCHES, *LORAS, RELEASE} if name in TWO_STAGES else {SWITCHES[0], START_IMAGE}
    assert modes == dict.fromkeys(expected, BYPASSED)


@pytest.mark.parametrize("name", NAMES)
def test_every_node_says_which_pack_it_comes_from(name):
    for node in read(name)["nodes"]:
        if node["type"] != "MarkdownNote":
            assert node["properties"]["cnr_id"] == ("comfyui-attune" if node["type"] in OURS else "comfy-core")
            assert node["properties"]["Node name for S&R"] == node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_the_note_lists_every_model_file_with_its_folder_and_address(name):
    workflow = read(name)
    notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    note = next(text for text in notes if "models/diffusion_models" in text)
    sections = re.split(r"\*\*ComfyUI/models/(\w+)\*\*", note)
    listed = {
        (folder, file, address)
        for folder, text in zip(sections[1::2], sections[2::2], strict=True)
        for file, address in re.findall(r"\[(\S+)\]\((\S+)\)", text)
    }
    assert listed == models_of(workflow)
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", []):
            assert node["widgets_values"][0] == model["name"] == model["url"].rsplit("/", 1)[-1]


@pytest.mark.comfyui
@pytest.mark.parametrize("name", NAMES)
def test_the_model_files_are_those_of_the_official_template(name):
    package = importlib.util.find_spec("comfyui_workflow_templates_json")
    if package is None:
        pytest.skip("this ComfyUI comes without the package comfyui_workflow_templates_json")
    folder = Path(next(iter(package.submodule_search_locations))) / "templates"
    official = json.loads((folder / f"{TEMPLATES[name]}.json").read_text("utf-8"))
    assert models_of(read(name)) == models_of(official)


def nodes_that_acted(result) -> dict[str, dict[str, str]]:
    """For each sampler the pack's nodes that stood on its model, and what they asked for."""
    assert all(run["status"] == "finished" for run in result.runs)
    return {run["sampler_node"]: {key: node["requested"] for key, node in run["nodes"].items()} for run in result.runs}


@pytest.mark.parametrize("name", NAMES)
def test_the_server_knows_every_node_and_value(name, server):
    prompt, info = server.api(read(name)), server.object_info()
    for number, node in prompt.items():
        required = info[node["class_type"]]["input"].get("required", {})
        assert required.keys() <= node["inputs"].keys(), number
    assert find_nodes(prompt, "AttentionSelector") and not find_nodes(prompt, "Sage3Switch")
    everything = server.api(set_mode(read(name), ACTIVE))
    assert len(find_nodes(everything, "Sage3Switch")) == len(find_nodes(everything, "AttentionSelector"))


@pytest.mark.parametrize("name", NAMES)
def test_as_shipped_it_makes_a_video(name, server):
    result = server.run(small(server, read(name), seed=1, latents=False))
    (video,) = result.files
    assert video.suffix == ".mp4" and video.stat().st_size > 0
    expected = {"57": {"115": "auto"}, "58": {"116": "auto"}}
    assert nodes_that_acted(result) == (expected if name in TWO_STAGES else {"57": expected["57"]})


@pytest.mark.parametrize("name", NAMES)
def test_bypassed_and_toggled(name, server):
    bypassed = small(server, set_mode(read(name), BYPASSED), seed=2)
    assert not OURS & {node["class_type"] for node in bypassed.values()}
    plain = server.run(bypassed)
    assert plain.runs == []
    stages = [("57", "115", "117"), ("58", "116", "118")][: 2 if name in TWO_STAGES else 1]

    both = server.run(small(server, set_mode(read(name), ACTIVE), seed=2))
    assert nodes_that_acted(both) == {sampler: {a: "auto", b: "sage3"} for sampler, a, b in stages}
    switch = server.run(small(server, set_mode(set_mode(read(name), ACTIVE), BYPASSED, {"AttentionSelector"}), seed=2))
    assert nodes_that_acted(switch) == {sampler: {b: "sage3"} for sampler, _, b in stages}
    off = small(server, set_mode(read(name), ACTIVE), seed=2)
    for number in find_nodes(off, "Sage3Switch"):
        off[number]["inputs"]["enable"] = False
    assert nodes_that_acted(server.run(off)) == {sampler: {a: "auto"} for sampler, a, _ in stages}
    assert close(latent(both), latent(plain)) and close(latent(switch), latent(plain))


@pytest.mark.parametrize("name", NAMES)
def test_with_every_kernel_name(name, server):
    plain = latent(server.run(small(server, set_mode(read(name), BYPASSED), seed=3)))
    names = kernel_names(server)
    assert len(names) >= 27
    for kernel in names:
        prompt = small(server, read(name), seed=3)
        for number in find_nodes(prompt, "AttentionSelector"):
            prompt[number]["inputs"]["kernel"] = kernel
        result = server.run(prompt)
        acted = nodes_that_acted(result)
        assert {wish for nodes in acted.values() for wish in nodes.values()} == {kernel}
        assert len(acted) == (2 if name in TWO_STAGES else 1)
        assert close(latent(result), plain), kernel


def kernel_names(server) -> list[str]:
    kind, options = server.object_info()["AttentionSelector"]["input"]["required"]["kernel"]
    return options["options"] if isinstance(kind, str) else kind


def close(one, other) -> bool:
    """The server runs on the CPU, where every kernel that can run is exact and the others fall back to one."""
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())


@pytest.mark.parametrize("name", TWO_STAGES)
def test_the_4_step_option_as_the_note_describes_it(name, server):
    prompt = small(server, set_mode(read(name), ACTIVE, LORAS), seed=4, steps=4)
    assert len(find_nodes(prompt, "LoraLoaderModelOnly")) == 2
    prompt[CFG]["inputs"]["value"] = 1.0
    forwards = [run["forwards"] for run in server.run(prompt).runs]
    assert forwards == [2, 2], "two steps in each stage, one forward a step at CFG 1"


def test_the_5b_workflow_starts_from_a_picture_once_its_node_is_on(server):
    prompt = small(server, set_mode(read(ONE_STAGE), ACTIVE, {START_IMAGE}), seed=5)
    assert prompt["67"]["inputs"]["start_image"] == [str(START_IMAGE), 0]
    assert latent(server.run(prompt)).isfinite().all()
