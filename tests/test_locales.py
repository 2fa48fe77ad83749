"""What the pack says of its nodes besides their schemas: the pages of the help panel, Chinese names and tooltips."""

from __future__ import annotations

import ast
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfyui_attune.attention.policy import KERNEL_NAMES
from support.loading import ROOT

DOCS = ROOT / "web" / "docs"
CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def nodes(server) -> dict[str, dict]:
    """The pack's nodes as the server tells of them."""
    everything = server.object_info()
    ours = everything["AttentionSelector"]["python_module"]
    found = {name: info for name, info in everything.items() if info["python_module"] == ours}
    assert "AttentionSelector" in found and "DeleteModelPassthrough" in found
    return found


def inputs_of(info: dict) -> dict[str, list]:
    return {name: given for kind in ("required", "optional") for name, given in info["input"].get(kind, {}).items()}


def test_every_node_has_a_page_that_tells_its_inputs(nodes, server):
    assert {path.stem for path in DOCS.glob("*.md")} == set(nodes)
    for name, info in nodes.items():
        text = (DOCS / f"{name}.md").read_text("utf-8")
        assert text.startswith("# ") and len(text) > 200, name
        named = set(re.findall(r"`([a-z_0-9]+)`", text))
        inputs = set(inputs_of(info)) - {"model"}
        if {"first", "second", "third", "fourth"} <= inputs:
            inputs -= {"second", "third"}  # written as `first` … `fourth`
        assert inputs <= named, (name, inputs - named)


def test_the_pages_of_the_nodes_used_most_are_there_in_chinese(nodes):
    """With the same inputs and values, which are not translated, and no number but those of the English page."""
    assert {path.parent.name for path in DOCS.glob("*/zh.md")} == {
        "AttentionSelector", "Sage3Switch", "SDPAForce", "AttentionRule", "ReleaseModel", "AttentionDoctor",
    }  # fmt: skip
    for path in DOCS.glob("*/zh.md"):
        name = path.parent.name
        text, english = path.read_text("utf-8"), (DOCS / f"{name}.md").read_text("utf-8")
        assert text.startswith(f"# {CHINESE[name]['display_name']}\n"), name
        assert set(re.findall(r"`([^`]+)`", text)) == set(re.findall(r"`([^`]+)`", english)), name
        assert text.count("\n|") == english.count("\n|"), "as many rows"
        for row in re.findall(r"^\| (.*?) \| ", text, re.MULTILINE)[1:]:
            for key in re.findall(r"`(\w+)`", row):
                assert f"{CHINESE[name]['inputs'][key]['name']} `{key}`" in row, "as the node shows it"
        assert set(re.findall(r"\d+", text)) == set(re.findall(r"\d+", english)), name


def test_comfyui_serves_the_pages(nodes, server):
    folder = nodes["AttentionSelector"]["python_module"].removeprefix("custom_nodes.")
    for path in DOCS.rglob("*.md"):
        address = f"{server.url}/extensions/{folder}/docs/{path.relative_to(DOCS).as_posix()}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.read().decode("utf-8") == path.read_text("utf-8")


def test_every_word_of_a_node_is_there_in_chinese(nodes):
    assert set(CHINESE) == set(nodes)
    for name, info in nodes.items():
        told = CHINESE[name]
        assert set(told) == {"display_name", "description", "inputs", "outputs"}
        assert set(told["inputs"]) == set(inputs_of(info)), name
        assert set(told["outputs"]) == {str(number) for number in range(len(info["output_name"]))}, name
        texts = [told["description"]]
        for part in (*told["inputs"].values(), *told["outputs"].values()):
            assert set(part) == {"name", "tooltip"}
            texts.append(part["tooltip"])
        assert all(re.search(r"[\u4e00-\u9fff]", text) for text in texts), name


def test_numbers_and_values_in_tooltips_are_the_same_in_both_languages(nodes):
    """What a tooltip says of an option has to follow the schema: its names and numbers are not translated."""
    for name, info in nodes.items():
        for key, given in inputs_of(info).items():
            english = given[1].get("tooltip", "") if len(given) > 1 else ""
            chinese = CHINESE[name]["inputs"][key]["tooltip"]
            options = re.findall(r"(?:^|[.:;] )([a-z_]+): ", english)
            assert all(option in chinese for option in options), (name, key, options)
            numbers = set(re.findall(r"\d+", english))
            assert numbers <= set(re.findall(r"\d+", chinese)), (name, key, numbers)


def test_comfyui_offers_the_chinese_names(server):
    offered = server.get("/i18n")["zh"]["nodeDefs"]
    assert offered["AttentionSelector"] == CHINESE["AttentionSelector"]


def test_the_browser_shows_them(page):
    page.server.post("/settings", {"Comfy.Locale": "zh"})
    try:
        page.page.reload()
        page.page.wait_for_function("() => window.app?.graph && window.app?.extensionManager", timeout=60_000)
        page.call("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('AttentionSelector')) }")
        page.page.wait_for_timeout(500)
        assert page.call("() => app.graph.nodes[0].title") == CHINESE["AttentionSelector"]["display_name"]
        labels = page.call("() => app.graph.nodes[0].widgets.map(widget => widget.label)")
        assert CHINESE["AttentionSelector"]["inputs"]["kernel"]["name"] in labels
    finally:
        page.server.post("/settings", {"Comfy.Locale": "en"})


PANEL = ROOT / "web" / "panel"


def chinese(file: str) -> dict:
    return json.loads((ROOT / "locales" / "zh" / file).read_text("utf-8"))


def test_every_word_of_the_panel_is_there_in_chinese():
    """With the same places to be filled in."""
    text = (PANEL / "text.js").read_text("utf-8")
    english = text.partition("ENGLISH = {")[2].partition("\n};")[0]
    found = re.findall(r'^  "?([\w. ]+?)"?:((?:\s*"(?:[^"\\]|\\.)*"(?: \+)?)+),$', english, re.MULTILINE)
    told = chinese("main.json")["attune"]
    assert len(found) > 100 and [name for name, _ in found] == list(told)
    for name, words in found:
        assert set(re.findall(r"\{\w+\}", words)) == set(re.findall(r"\{\w+\}", told[name])), name


def texts_of(path: Path) -> Iterator[str]:
    """The texts in a file, each with "{}" where something varies."""
    for item in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(item, ast.Constant) and isinstance(item.value, str):
            yield item.value
        elif isinstance(item, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in item.values)


def test_the_sentences_that_are_known_in_chinese_are_said_by_the_pack():
    """A page knows them by their words: one that is changed in the code has to be changed here too."""
    corpus = {text for folder in ("attention", "doctor", "host", "nodes") for path in (ROOT / folder).glob("*.py")
              for text in texts_of(path)}  # fmt: skip
    told = chinese("main.json")["attune_said"]
    assert len(told) > 60
    for english, words in told.items():
        assert set(re.findall(r"\{\w+\}", words)) <= set(re.findall(r"\{\w+\}", english)), english
        assert re.search(r"[\u4e00-\u9fff]", words), english
        for part in re.split(r"\{\w+\}| in (?=\{)", english):  # "{what} in {where}" is put together
            part = part.strip(" ,:()")
            assert any(part in text for text in corpus), (english, part)


def test_commands_and_settings_are_there_in_chinese():
    commands = re.findall(r'id: "(Attune\.\w+)"', (ROOT / "web" / "panel.js").read_text("utf-8"))
    assert {name.replace(".", "_") for name in commands} == set(chinese("commands.json"))
    settings = re.findall(r'id: "(Attune\.\w+)"', (PANEL / "settings.js").read_text("utf-8"))
    assert {name.replace(".", "_") for name in settings} == set(chinese("settings.json"))
    assert all(set(told) == {"name", "tooltip"} for told in chinese("settings.json").values())
    headings = re.findall(r'category: \["Attune", "([\w ]+)"', (PANEL / "settings.js").read_text("utf-8"))
    assert set(headings) == set(chinese("main.json")["settingsCategories"])


def test_the_kernels_of_the_settings_are_those_of_the_nodes():
    listed = (PANEL / "settings.js").read_text("utf-8").partition("KERNELS = [")[2].partition("]")[0]
    assert re.findall(r'"(\w+)"', listed) == KERNEL_NAMES
