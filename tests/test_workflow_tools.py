"""`attune workflow`: what it makes of workflow files."""

from __future__ import annotations

import ast
import copy
import json
import stat

import hypothesis
import pytest
from hypothesis import strategies

from comfyui_attune import cli
from comfyui_attune.graphs import kinds, text
from comfyui_attune.graphs.book import Book
from comfyui_attune.graphs.edit import MARK, insert, remove
from support.loading import ROOT
from support.workflows import NAMES, nodes_of, read, set_mode

OURS = {"AttentionSelector", "Sage3Switch"}


def made(number: int, kind: str, inputs: dict[str, tuple[str, int | None]] | None = None, outputs=(), **more) -> dict:
    """A node as the front end saves it. inputs: name -> (type, link); outputs: (type, links)."""
    return {
        "id": number,
        "type": kind,
        "pos": [400 * number, 100],
        "size": [300, 100],
        "flags": {},
        "order": number,
        "mode": 0,
        "inputs": [{"name": name, "type": one[0], "link": one[1]} for name, one in (inputs or {}).items()],
        "outputs": [{"name": of, "type": of, "links": list(links)} for of, links in outputs],
        "properties": {},
        "widgets_values": [],
        **more,
    }


def loader(number: int, links: list[int], **more) -> dict:
    return made(number, "UNETLoader", None, [("MODEL", links)], **more)


def patch(number: int, before: int | None, links: list[int], kind: str = "LoraLoaderModelOnly", **more) -> dict:
    return made(number, kind, {"model": ("MODEL", before)}, [("MODEL", links)], **more)


def sampler(number: int, before: int | None, **more) -> dict:
    return made(number, "KSampler", {"model": ("MODEL", before)}, [("LATENT", [])], **more)


def link(number: int, origin: int, target: int, kind: str = "MODEL", slot: int = 0) -> list:
    return [number, origin, 0, target, slot, kind]


def workflow(nodes: list[dict], links: list, **more) -> dict:
    last = max([0, *(node["id"] for node in nodes)])
    return {
        "id": "0" * 8, "revision": 0, "last_node_id": last, "last_link_id": max([0, *(one[0] for one in links)]),
        "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4, **more,
    }  # fmt: skip


def as_objects(graph: dict) -> dict:
    """The same graph in the newer form: links are objects, counters in `state`."""
    graph = copy.deepcopy(graph)
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    graph["links"] = [dict(zip(names, one, strict=True)) for one in graph["links"]]
    graph["state"] = {
        "lastNodeId": graph.pop("last_node_id"), "lastLinkId": graph.pop("last_link_id"), "lastGroupId": 0,
        "lastRerouteId": 0,
    }  # fmt: skip
    graph["version"] = 1
    return graph


def chain() -> dict:
    """A loader, a LoRA, a sampler and a scheduler behind it."""
    return workflow(
        [
            loader(1, [1]),
            patch(2, 1, [2, 3]),
            sampler(3, 2),
            made(4, "BasicScheduler", {"model": ("MODEL", 3)}, [("SIGMAS", [])]),
        ],
        [link(1, 1, 2), link(2, 2, 3), link(3, 2, 4)],
    )


def sources(flow: dict) -> dict[str, str]:
    """ "node.input" -> "node type" that feeds it, of every linked input of the workflow itself."""
    types = {node["id"]: node["type"] for node in flow["nodes"]}
    origins = {one[0]: one[1] if isinstance(one, list) else 0 for one in flow["links"] if isinstance(one, list)}
    origins |= {one["id"]: one["origin_id"] for one in flow["links"] if isinstance(one, dict)}
    return {
        f"{node['id']}.{one['name']}": types.get(origins[one["link"]], "outside")
        for node in flow["nodes"]
        for one in node["inputs"]
        if one["link"] is not None
    }


def selectors(flow: dict) -> list[dict]:
    graphs = [flow, *flow.get("definitions", {}).get("subgraphs", [])]
    return [node for graph in graphs for node in graph["nodes"] if node["type"] == "AttentionSelector"]


def whole(graph: dict) -> None:
    """Every link has both ends, and they name it once."""
    nodes = nodes_of(graph)
    assert len(nodes) == len(graph["nodes"])
    for one in graph["links"]:
        fields = one if isinstance(one, list) else list(one.values())
        number, origin, slot, target, end = fields[:5]
        if origin in nodes:
            assert nodes[origin]["outputs"][slot]["links"].count(number) == 1
        if target in nodes:
            assert nodes[target]["inputs"][end]["link"] == number
    ends = [number for node in graph["nodes"] for out in node["outputs"] for number in out["links"] or []]
    assert len(ends) == len(set(ends))


@pytest.fixture
def attune(tmp_path, capsys):
    """attune(data, "insert", …): (status, what was printed, the file's JSON afterwards). data: JSON or its text."""

    def run(data, action: str, *options: str, name: str = "é flow.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data, ensure_ascii=False), "utf-8")
        status = cli.main(["workflow", action, str(path), *options])
        said = capsys.readouterr()
        return status, said.out + said.err, json.loads(path.read_text("utf-8"))

    return run


# JSON to the letter.

LETTERS = (
    '{\n  "a": [1.0, 1.50, 1e5, 1E-7, -0, -0.0, 100000000000000000000001, 0.1],\n  "é": "\\ud83d ÿ \U0001f600"\n}\n'
)


def test_numbers_and_letters_stay_as_they_are():
    data = text.loads(LETTERS, "it")
    written = text.dumps(data, text.style_of(LETTERS))
    assert written.split('"é"')[1] == LETTERS.split('"é"')[1]
    assert "".join(written.split()) == "".join(LETTERS.split())
    assert json.loads(written) == json.loads(LETTERS)
    assert list(map(str, data["a"][:1])) == ["1.0"] and data["a"][1] == 1.5


@pytest.mark.parametrize("number", ["1.50", "1e5", "-0", "9" * 5000, "1e999", "0.1000"])
def test_a_number_that_python_would_write_otherwise(number):
    assert text.dumps(text.loads(f"[{number}]", "it"), text.Style()) == f"[{number}]"


@pytest.mark.parametrize("indent", [None, 2, 4, "\t"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_style_of_a_file_stays(indent, ascii_only):
    data = {"é": [1, {"b": [], "c": {}}, "x"], "d": None, "e": [True, False]}
    for separators in ((",", ":"), (", ", ": ")) if indent is None else ((",", ": "),):
        given = json.dumps(data, indent=indent, ensure_ascii=ascii_only, separators=separators)
        for whole_text in (given, given + "\n", "\ufeff" + given, given.replace("\n", "\r\n")):
            read_again = text.loads(whole_text.removeprefix("\ufeff"), "it")
            assert text.dumps(read_again, text.style_of(whole_text)) == whole_text


JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(strategies.text(), inner, max_size=4),
    max_leaves=20,
)


@hypothesis.example(data={",": None, "": None})
@hypothesis.given(data=strategies.dictionaries(strategies.text(), JSON, max_size=5))
def test_any_json_is_written_as_it_was_read(data):
    given = json.dumps(data)
    assert text.dumps(text.loads(given, "it"), text.style_of(given)) == given


# What stands in them.


def test_show_says_what_is_on_which_branch(attune):
    status, said, _ = attune(read("wan2.2_i2v_14b"), "show")
    assert status == 0
    lines = said.splitlines()
    assert lines[0].endswith("nodes") and "as ComfyUI saves it" in lines[0]
    assert lines[1].startswith("KSamplerAdvanced (57, 'High noise: ")
    assert lines[2].strip() == "AttentionSelector (115, 'High noise: Attention Selector'): auto"
    assert lines[3].strip() == "Sage3Switch (117, 'High noise: Sage3 Switch') [bypassed]"
    assert "116" in lines[5] and "118" in lines[6] and len(lines) == 7


def test_show_as_json_and_what_is_on_no_branch(attune, tmp_path):
    flow = chain()
    flow["nodes"].append(patch(9, None, [], "Sage3AttentionOnlySwitch"))
    status, said, _ = attune(flow, "show")
    assert status == 0 and "no attention node" in said and "Sage3AttentionOnlySwitch (9): on no model branch" in said
    insert(Book(flow), "sdpa")
    _, said, _ = attune(flow, "show", "--json")
    (row,) = json.loads(said)
    assert (row["id"], row["type"], row["state"], row["on_every_way"]) == (3, "KSampler", "active", True)
    assert [one["kernel"] for one in row["attention"]] == ["sdpa"]


# insert and remove.


def test_a_new_node_is_what_the_packs_own_workflows_have():
    node = next(node for node in read("wan2.2_i2v_14b")["nodes"] if node["type"] == "AttentionSelector")
    new = kinds.saved_node("AttentionSelector")
    for key in ("type", "size", "widgets_values", "flags"):
        assert new[key] == node[key]
    for side in ("inputs", "outputs"):
        assert [{**one, "link": 0, "links": 0} for one in new[side]] == [
            {**one, "link": 0, "links": 0} for one in node[side]
        ]
    switch = next(node for node in read("wan2.2_i2v_14b")["nodes"] if node["type"] == "Sage3Switch")
    assert kinds.saved_node("Sage3Switch")["widgets_values"] == switch["widgets_values"]


def test_names_of_other_packs_mean_the_same_as_in_the_nodes():
    tree = ast.parse((ROOT / "nodes" / "schema.py").read_text("utf-8"))
    (found,) = [
        ast.literal_eval(item.value)
        for item in tree.body
        if isinstance(item, ast.AnnAssign) and getattr(item.target, "id", "") == "ALIASES"
    ]
    assert found == {name: kernel for name, kernel in kinds.KERNELS.items() if name != "auto"}


@pytest.mark.parametrize("form", [lambda flow: flow, as_objects], ids=["lists", "objects"])
def test_one_selector_before_what_samples_and_out_again(attune, form):
    flow = form(chain())
    status, said, after = attune(flow, "insert", "--kernel", "flash2")
    assert status == 0 and "put in before KSampler (3)" in said
    assert sources(after) == {
        "2.model": "UNETLoader",
        "3.model": "AttentionSelector",
        "4.model": "LoraLoaderModelOnly",
        "5.model": "LoraLoaderModelOnly",
    }
    (new,) = selectors(after)
    assert new["widgets_values"][0] == "flash2" and new["id"] == 5
    whole(after)
    untouched = {node["id"]: node for node in after["nodes"] if node["id"] in (1, 3)}
    assert untouched == {node["id"]: node for node in flow["nodes"] if node["id"] in (1, 3)}
    status, said, back = attune(after, "remove")
    assert status == 0 and "removed" in said
    assert json.dumps(back) == json.dumps(flow)


def test_once_per_output_and_not_per_link(attune):
    flow = workflow(
        [loader(1, [1, 2, 3]), sampler(2, 1), sampler(3, 2), patch(4, 3, [4]), sampler(5, 4)],
        [link(1, 1, 2), link(2, 1, 3), link(3, 1, 4), link(4, 4, 5)],
    )
    _, _, after = attune(flow, "insert")
    found = sources(after)
    assert len(selectors(after)) == 2
    assert found["2.model"] == found["3.model"] == found["5.model"] == "AttentionSelector"
    assert found["4.model"] == "UNETLoader"
    whole(after)


def test_a_branch_that_has_one_is_left_and_told(attune):
    status, said, after = attune(read("wan2.2_i2v_14b"), "insert")
    assert status == 0 and after == read("wan2.2_i2v_14b")
    assert said.count("already") == 2 and "AttentionSelector (115" in said and "bypassed" in said
    assert "is as it was" in said
    one = workflow([loader(1, [1, 3]), patch(2, 1, [2], "SDPAForce"), sampler(3, 2), sampler(4, 3)],
                   [link(1, 1, 2), link(2, 2, 3), link(3, 1, 4)])  # fmt: skip
    _, said, after = attune(one, "insert")
    assert "KSampler (3): has SDPAForce (2) already" in said and sources(after)["4.model"] == "AttentionSelector"


def test_a_switch_with_a_selector_on_one_way_only_gets_one(attune):
    both = made(3, "ComfySwitchNode", {"on_false": ("MODEL", 1), "on_true": ("MODEL", 3)}, [("MODEL", [4])])
    flow = workflow([loader(1, [1, 2]), patch(2, 2, [3], "AttentionSelector"), both, sampler(4, 4)],
                    [link(1, 1, 3), link(2, 1, 2), link(3, 2, 3, slot=1), link(4, 3, 4)])  # fmt: skip
    _, said, _ = attune(flow, "show")
    assert "on some of the ways to it only" in said
    _, _, after = attune(flow, "insert")
    assert sources(after)["4.model"] == "AttentionSelector" and len(selectors(after)) == 2


def reroute(number: int, before: int, links: list[int]) -> dict:
    return made(number, "Reroute", {"": ("*", before)}, [("MODEL", links)])


def test_reroutes_share_one_selector(attune):
    flow = workflow([loader(1, [1, 2]), reroute(2, 1, [3, 4]), sampler(3, 2), sampler(4, 3), sampler(5, 4)],
                    [link(1, 1, 2, "*"), link(2, 1, 3), link(3, 2, 4), link(4, 2, 5)])  # fmt: skip
    _, _, after = attune(flow, "insert")
    assert len(selectors(after)) == 1
    assert sources(after)["2."] == sources(after)["3.model"] == "AttentionSelector"
    assert sources(after)["4.model"] == sources(after)["5.model"] == "Reroute"
    behind = workflow([loader(1, [1]), reroute(2, 1, [2]), sampler(3, 2)], [link(1, 1, 2, "*"), link(2, 2, 3)])
    _, _, after = attune(behind, "insert")
    assert sources(after) == {"2.": "UNETLoader", "3.model": "AttentionSelector", "4.model": "Reroute"}


def test_set_and_get_nodes_share_one_selector(attune):
    named = {"widgets_values": ["model"]}
    flow = workflow(
        [
            loader(1, [1]),
            made(2, "SetNode", {"MODEL": ("MODEL", 1)}, [("*", [])], **named),
            made(3, "GetNode", None, [("MODEL", [2])], **named),
            made(4, "GetNode", None, [("MODEL", [3])], **named),
            sampler(5, 2),
            sampler(6, 3),
        ],
        [link(1, 1, 2), link(2, 3, 5), link(3, 4, 6)],
    )
    _, _, after = attune(flow, "insert")
    assert len(selectors(after)) == 1 and sources(after)["2.MODEL"] == "AttentionSelector"
    _, said, _ = attune(after, "show")
    assert said.count("AttentionSelector (7)") == 2
    assert attune(after, "remove")[2] == flow


def test_a_bypassed_part_stays_bypassed_as_a_whole(attune):
    flow = workflow([loader(1, [1], mode=4), sampler(2, 1, mode=4)], [link(1, 1, 2)])
    _, said, after = attune(flow, "insert")
    assert selectors(after)[0]["mode"] == 4 and "bypassed as they are" in said
    _, said, _ = attune(after, "show")
    assert "[bypassed]" in said


def test_what_takes_a_model_without_sampling_gets_none(attune):
    passive = made(2, "BasicScheduler", {"model": ("MODEL", 1)}, [("SIGMAS", [])])
    saver = made(3, "ModelSave", {"model": ("MODEL", 2)}, [])
    status, said, after = attune(
        workflow([loader(1, [1, 2]), passive, saver], [link(1, 1, 2), link(2, 1, 3)]), "insert"
    )
    assert status == 2 and "nothing in the workflow samples" in said and not selectors(after)


def test_a_sampler_that_gives_its_model_on_and_one_without(attune):
    efficient = made(2, "KSampler (Efficient)", {"model": ("MODEL", 1), "latent_image": ("LATENT", None)},
                     [("MODEL", [2]), ("LATENT", [])])  # fmt: skip
    flow = workflow([loader(1, [1]), efficient, sampler(3, 2), sampler(4, None)], [link(1, 1, 2), link(2, 2, 3)])
    _, said, after = attune(flow, "insert")
    assert sources(after)["2.model"] == "AttentionSelector" and len(selectors(after)) == 1
    assert "no model is linked to KSampler (4)" in said


def test_group_nodes_are_told(attune):
    group = made(2, "workflow>mine", {"model": ("MODEL", 1)}, [("LATENT", [])])
    _, said, after = attune(workflow([loader(1, [1]), group], [link(1, 1, 2)]), "insert")
    assert "group node of older versions" in said and sources(after)["2.model"] == "AttentionSelector"


def definition(name: str, nodes: list[dict], links: list[list], inputs=(), outputs=()) -> dict:
    """A subgraph. inputs, outputs: (name, type, linkIds)."""
    graph = as_objects(workflow(nodes, links))
    sides = {
        side: [{"id": f"{side}{at}", "name": one[0], "type": one[1], "linkIds": one[2]} for at, one in enumerate(given)]
        for side, given in (("inputs", inputs), ("outputs", outputs))
    }
    ends = {"inputNode": {"id": -10, "bounding": [0, 0, 1, 1]}, "outputNode": {"id": -20, "bounding": [9, 0, 1, 1]}}
    return {**graph, "id": name, "name": name.title(), **ends, **sides, "widgets": []}


def holding(subgraphs: list[dict], nodes: list[dict], links: list[list]) -> dict:
    return workflow(nodes, links, definitions={"subgraphs": subgraphs})


def test_inside_a_subgraph(attune):
    inner = definition("inner", [loader(11, [11]), sampler(12, 11)], [link(11, 11, 12)])
    flow = holding([inner], [made(1, "inner"), made(2, "inner")], [])
    _, said, after = attune(flow, "insert")
    (new,) = selectors(after)
    (graph,) = after["definitions"]["subgraphs"]
    assert new in graph["nodes"] and new["id"] == 13 and "in subgraph 'Inner'" in said
    assert sources(graph) == {"12.model": "AttentionSelector", "13.model": "UNETLoader"}
    whole(graph)
    assert json.dumps(attune(after, "remove")[2]) == json.dumps(flow)


def test_a_model_that_goes_into_subgraphs_as_it_is_gets_one_outside(attune):
    inner = definition("inner", [sampler(12, 11)], [link(11, -10, 12)], inputs=[("model", "MODEL", [11])])
    outer = definition(
        "outer", [made(21, "inner", {"model": ("MODEL", 21)})], [link(21, -10, 21)], inputs=[("m", "MODEL", [21])]
    )
    flow = holding([inner, outer],
                   [loader(1, [1, 2, 3]), made(2, "inner", {"model": ("MODEL", 1)}),
                    made(3, "outer", {"m": ("MODEL", 2)}), sampler(4, 3)],
                   [link(1, 1, 2), link(2, 1, 3), link(3, 1, 4)])  # fmt: skip
    _, _, after = attune(flow, "insert")
    assert len(selectors(after)) == 1 and selectors(after)[0] in after["nodes"]
    assert {sources(after)[f"{one}"] for one in ("2.model", "3.m", "4.model")} == {"AttentionSelector"}
    assert sum("Selector" in line for line in attune(after, "show")[1].splitlines()) == 2
    assert json.dumps(attune(after, "remove")[2]) == json.dumps(flow)
    assert "already" in attune(after, "insert")[1]


def test_a_patch_inside_a_subgraph_comes_before_the_selector(attune):
    inner = definition("inner", [patch(11, 11, [12]), sampler(12, 12)], [link(11, -10, 11), link(12, 11, 12)],
                       inputs=[("model", "MODEL", [11])])  # fmt: skip
    flow = holding([inner], [loader(1, [1]), made(2, "inner", {"model": ("MODEL", 1)})], [link(1, 1, 2)])
    _, _, after = attune(flow, "insert")
    assert sources(after["definitions"]["subgraphs"][0])["12.model"] == "AttentionSelector"
    assert sources(after)["2.model"] == "UNETLoader"


def test_a_model_that_comes_out_of_a_subgraph(attune):
    inner = definition("inner", [loader(11, [11])], [link(11, 11, -20)], outputs=[("model", "MODEL", [11])])
    flow = holding([inner], [made(1, "inner", None, [("MODEL", [1])]), sampler(2, 1)], [link(1, 1, 2)])
    _, _, after = attune(flow, "insert")
    assert sources(after)["2.model"] == "AttentionSelector"
    inside = copy.deepcopy(flow)
    graph = inside["definitions"]["subgraphs"][0]
    graph["nodes"].append(patch(12, 11, [12], "AttentionSelector"))
    graph["links"][0]["target_id"] = 12
    graph["links"].append({**graph["links"][0], "id": 12, "origin_id": 12, "target_id": -20})
    graph["outputs"][0]["linkIds"] = [12]
    _, said, _ = attune(inside, "insert")
    assert "KSampler (2): has AttentionSelector (12) in subgraph 'Inner' already" in said
    _, _, after = attune(inside, "remove")
    graph = after["definitions"]["subgraphs"][0]
    assert [one["id"] for one in graph["links"]] == graph["outputs"][0]["linkIds"] == [12]
    assert graph["links"][0]["origin_id"] == 11 and graph["nodes"][0]["outputs"][0]["links"] == [12]


def test_widgets_of_a_removed_node_are_no_longer_shown_outside(attune):
    inner = definition(
        "inner", [loader(11, [11]), patch(12, 11, [12], "AttentionSelector"), sampler(13, 12)],
        [link(11, 11, 12), link(12, 12, 13)],
    )  # fmt: skip
    shown = {"proxyWidgets": [["13", "seed"], ["12", "kernel"], ["13", "cfg"]]}
    flow = holding([inner], [made(1, "inner", properties=shown, widgets_values=[1, "auto", 2.0])], [])
    _, _, after = attune(flow, "remove")
    assert after["nodes"][0]["properties"] == {"proxyWidgets": [["13", "seed"], ["13", "cfg"]]}
    assert after["nodes"][0]["widgets_values"] == [1, 2.0]


def test_reroutes_drawn_on_links_stay(attune):
    flow = chain()
    flow["extra"] = {
        "linkExtensions": [{"id": 2, "parentId": 1}, {"id": 3, "parentId": 2}],
        "reroutes": [
            {"id": 1, "pos": [5, 5], "linkIds": [2, 3]},
            {"id": 2, "parentId": 1, "pos": [6, 6], "linkIds": [3]},
        ],
    }
    _, _, after = attune(flow, "insert")
    # One reroute stands on both links, and may come from one output only: so the scheduler goes along.
    assert sources(after)["3.model"] == sources(after)["4.model"] == "AttentionSelector"
    assert after["extra"] == flow["extra"]
    assert json.dumps(attune(after, "remove")[2]) == json.dumps(flow)


@pytest.mark.parametrize("name", NAMES)
def test_removing_the_nodes_of_the_packs_own_workflows(attune, name):
    flow = read(name)
    status, _, after = attune(flow, "remove")
    assert status == 0 and not OURS & {node["type"] for node in after["nodes"]}
    whole(after)
    ids = {one[0] for one in after["links"]}
    reroutes = {one["id"]: one for one in after["extra"]["reroutes"]}
    for extension in after["extra"]["linkExtensions"]:
        at = extension["parentId"]
        assert extension["id"] in ids
        while at is not None:
            assert extension["id"] in reroutes[at]["linkIds"]
            at = reroutes[at].get("parentId")
    assert all(set(one["linkIds"]) <= ids for one in reroutes.values())
    _, _, again = attune(after, "insert")
    assert len(selectors(again)) == len(selectors(flow))


def test_a_removed_node_that_nothing_fed(attune):
    flow = workflow([patch(1, None, [1], "AttentionSelector"), sampler(2, 1)], [link(1, 1, 2)])
    _, _, after = attune(flow, "remove")
    assert after["links"] == [] and after["nodes"][0]["inputs"][0]["link"] is None


def test_new_nodes_lie_on_nothing(attune):
    flow = workflow(
        [loader(1, [1]), *(sampler(number, number - 1) for number in range(2, 30))],
        [link(number - 1, 1, number) for number in range(2, 30)],
    )
    flow["nodes"][0]["outputs"][0]["links"] = list(range(1, 29))
    for number, node in enumerate(flow["nodes"]):
        node["pos"] = {"0": 320 * (number % 6), "1": 150 * (number // 6)}
    _, _, after = attune(flow, "insert")
    (new,) = selectors(after)
    x, y = new["pos"]
    for node in flow["nodes"]:
        left, top = node["pos"]["0"], node["pos"]["1"]
        assert x >= left + 300 or x + 390 <= left or y - 30 >= top + 100 or y + 154 <= top - 30


# bypass and enable.


def modes(flow: dict) -> dict[int, int]:
    return {node["id"]: node["mode"] for node in flow["nodes"] if node["type"] in OURS}


def test_enable_gives_back_what_bypass_took_and_no_more(attune):
    flow = read("wan2.2_i2v_14b")
    status, said, after = attune(flow, "bypass")
    assert status == 0 and set(modes(after).values()) == {4} and said.count("bypassed already") == 2
    assert {node["id"] for node in after["nodes"] if node["properties"].get("attune_bypassed")} == {115, 116}
    assert attune(after, "bypass")[2] == after
    status, said, back = attune(after, "enable")
    assert status == 0 and json.dumps(back) == json.dumps(flow)
    assert said.count("was bypassed before the others and stays so; `attune workflow enable --id 11") == 2
    _, _, everything = attune(flow, "enable")  # none is marked: the user's own ones are meant
    assert modes(everything) == {115: 0, 116: 0, 117: 0, 118: 0}
    _, _, after = attune(
        attune(flow, "bypass", "--type", "AttentionSelector")[2], "enable", "--type", "AttentionSelector"
    )
    assert after == flow


def test_a_node_that_is_named_is_enabled_and_bypassed_for_itself(attune):
    flow = read("wan2.2_i2v_14b")
    _, _, after = attune(flow, "enable", "--id", "117")
    assert modes(after) == {115: 0, 116: 0, 117: 0, 118: 4}
    _, _, after = attune(flow, "bypass", "--type", "AttentionSelector", "--id", "116")
    assert modes(after) == {115: 0, 116: 4, 117: 4, 118: 4}
    _, _, after = attune(attune(after, "bypass")[2], "enable")
    assert modes(after) == {115: 0, 116: 4, 117: 4, 118: 4}, "116 was bypassed by name before"
    _, _, after = attune(flow, "enable", "--id", "91", "--id", "92")
    assert {node["mode"] for node in after["nodes"] if node["id"] in (91, 92)} == {0}
    one = attune(attune(flow, "bypass")[2], "enable", "--id", "117")[2]
    assert modes(one) == {115: 4, 116: 4, 117: 0, 118: 4}
    assert modes(attune(one, "enable")[2]) == {115: 0, 116: 0, 117: 0, 118: 4}


def test_muted_nodes_stay_muted_unless_they_are_named(attune):
    flow = set_mode(read("wan2.2_i2v_14b"), 2, {117})
    assert "Sage3Switch (117, 'High noise: Sage3 Switch') [muted]" in attune(flow, "show")[1]
    for action in ("bypass", "enable"):
        for options in ([], ["--type", "Sage3Switch"]):
            _, said, after = attune(flow, action, *options)
            assert modes(after)[117] == 2 and "is muted and stays so; `attune workflow enable --id 117`" in said
    assert modes(attune(flow, "bypass", "--id", "117")[2])[117] == 2
    assert modes(attune(flow, "enable", "--id", "117")[2])[117] == 0


@pytest.mark.parametrize("properties", [None, [], "x"])
def test_a_node_without_properties_is_bypassed_as_well(attune, properties):
    flow = workflow([loader(1, [1]), patch(2, 1, [2], "SDPAForce", properties=properties), sampler(3, 2)],
                    [link(1, 1, 2), link(2, 2, 3)])  # fmt: skip
    _, _, after = attune(flow, "bypass")
    assert nodes_of(after)[2]["mode"] == 4
    assert nodes_of(attune(after, "enable")[2])[2]["mode"] == 0


def test_the_panel_has_the_same_mark():
    assert f'const MARK = "{MARK}"' in (ROOT / "web" / "panel" / "nodes.js").read_text("utf-8")


def test_an_id_inside_a_subgraph(attune):
    inner = definition("inner", [patch(2, None, [], "AttentionSelector")], [])
    flow = holding([inner], [made(38, "inner"), made(39, "inner"), patch(2, None, [], "AttentionSelector")], [])
    _, said, after = attune(flow, "bypass", "--id", "38:2")
    assert [node["mode"] for node in selectors(after)] == [0, 4] and "all 2 uses" in said


def test_nothing_of_that_kind(attune):
    for options in (["--type", "Nonsense"], ["--id", "9999"], ["--type", "KSampler", "--id", "115"]):
        status, said, after = attune(read("wan2.2_i2v_14b"), "bypass", *options)
        assert status == 2 and after == read("wan2.2_i2v_14b")
        assert "AttentionSelector (115, 'High noise: Attention Selector')" in said


# upgrade.


def old(kind: str, values: list, **linked) -> dict:
    inputs = {"model": ("MODEL", 1)} | {name: ("BOOLEAN", number) for name, number in linked.items()}
    node = made(2, kind, inputs, [("MODEL", [2])], widgets_values=values, title="Mine", pos=[7, 7])
    nodes = [loader(1, [1]), node, sampler(3, 2), made(4, "PrimitiveBoolean", None, [("BOOLEAN", [*linked.values()])])]
    links = [link(1, 1, 2), link(2, 2, 3), *(link(number, 4, 2, "BOOLEAN", 1) for number in linked.values())]
    return workflow(nodes, links)


@pytest.mark.parametrize(
    ("kind", "values", "becomes", "new"),
    [
        ("Sage3AttentionOnlySwitch", [True, True], "Sage3Switch", [True, False, 0, 0, 0, 0, "custom"]),
        ("Sage3AttentionOnlySwitch", [False, True], "Sage3Switch", [False, False, 0, 0, 0, 0, "custom"]),
        ("PathchSageAttentionKJ", ["auto", False], "AttentionSelector", ["sage"]),
        ("PathchSageAttentionKJ", ["sageattn_qk_int8_pv_fp8_cuda++"], "AttentionSelector", ["sage2_fp8_cuda_pp"]),
        ("PathchSageAttentionKJ", {"sage_attention": "sageattn3"}, "AttentionSelector", ["sage3"]),
        ("PatchFlashAttentionKJ", [True], "AttentionSelector", ["flash"]),
    ],
)
def test_upgrade_keeps_place_links_and_meaning(attune, kind, values, becomes, new):
    flow = old(kind, values)
    status, said, after = attune(flow, "upgrade")
    node = nodes_of(after)[2]
    assert status == 0 and f"is {becomes}" in said
    assert (node["type"], node["widgets_values"][: len(new)]) == (becomes, new)
    assert (node["title"], node["pos"], node["size"], node["mode"]) == ("Mine", [7, 7], [300, 100], 0)
    assert node["properties"]["Node name for S&R"] == becomes
    assert sources(after) == {"2.model": "UNETLoader", "3.model": becomes}
    whole(after)


def test_upgrade_of_what_was_disabled_and_of_values_that_nobody_knows(attune):
    for value in ("disabled", False):
        _, said, after = attune(old("PathchSageAttentionKJ", [value]), "upgrade")
        assert nodes_of(after)[2]["mode"] == 4 and "was disabled" in said
    flow = old("PathchSageAttentionKJ", ["sageattn9"])
    _, said, after = attune(flow, "upgrade")
    assert after == flow and "left as it is" in said and "sageattn9" in said
    flow = old("PathchSageAttentionKJ", ["auto"], sage_attention=9)
    assert attune(flow, "upgrade")[2] == flow


def test_upgrade_keeps_a_link_to_enable_and_drops_one_to_what_is_gone(attune):
    _, _, after = attune(old("Sage3AttentionOnlySwitch", [True, True], enable=9), "upgrade")
    assert sources(after)["2.enable"] == "PrimitiveBoolean"
    whole(after)
    _, _, after = attune(old("PatchFlashAttentionKJ", [True], allow_compile=9), "upgrade")
    assert len(after["links"]) == 2 and nodes_of(after)[4]["outputs"][0]["links"] == []
    whole(after)


@pytest.mark.parametrize(
    ("kind", "values", "changed", "kernel"),
    [
        ("DiffusionModelLoaderKJ", ["m", "default", "default", False, "auto", True], 4, "sage"),
        ("CheckpointLoaderKJ", ["m", False, "sageattn_qk_int8_pv_fp16_cuda"], 2, "sage2_fp16_cuda"),
        ("GGUFLoaderKJ", ["m", "none", "default", "default", False, True, "sdpa"], 6, "sdpa"),
    ],
)
def test_upgrade_of_loaders_that_patch(attune, kind, values, changed, kernel):
    flow = workflow([made(1, kind, None, [("MODEL", [1])], widgets_values=values), sampler(2, 1)], [link(1, 1, 2)])
    _, _, after = attune(flow, "upgrade")
    off = "none" if kind == "GGUFLoaderKJ" else "disabled"
    assert nodes_of(after)[1]["widgets_values"] == [*values[:changed], off, *values[changed + 1 :]]
    assert selectors(after)[0]["widgets_values"][0] == kernel and sources(after)["2.model"] == "AttentionSelector"
    assert attune(after, "upgrade")[2] == after


# API format.


def api(**more) -> dict:
    return {
        "4": {"inputs": {"unet_name": "m", "weight_dtype": "default"}, "class_type": "UNETLoader"},
        "5": {"inputs": {"model": ["4", 0], "strength_model": 1.0}, "class_type": "LoraLoaderModelOnly"},
        "6": {"inputs": {"model": ["5", 0], "scheduler": "simple"}, "class_type": "BasicScheduler"},
        "3": {
            "inputs": {"model": ["5", 0], "seed": 2**70, "cfg": 8.0},
            "class_type": "KSampler",
            "_meta": {"title": "é"},
        },
        "8": {"inputs": {"samples": ["3", 0]}, "class_type": "VAEDecode"},
        "9": {"inputs": {"guider": ["10", 0], "sigmas": ["6", 0]}, "class_type": "SamplerCustomAdvanced"},
        "10": {"inputs": {"model": ["4", 0]}, "class_type": "BasicGuider"},
        **more,
    }


def test_api_format_in_and_out(attune):
    status, said, after = attune(api(), "insert", "--kernel", "sdpa")
    assert status == 0
    ours = {key: node for key, node in after.items() if node["class_type"] == "AttentionSelector"}
    assert [node["inputs"]["model"] for node in ours.values()] == [["4", 0], ["5", 0]]
    first, second = ours
    assert after["3"]["inputs"]["model"] == [second, 0] and after["10"]["inputs"]["model"] == [first, 0]
    assert after["6"]["inputs"]["model"] == ["5", 0], "a scheduler samples nothing"
    assert ours[first]["inputs"] == {"model": ["4", 0], **kinds.values("AttentionSelector", kernel="sdpa")}
    assert "sdpa" in attune(after, "show")[1]
    assert json.dumps(attune(after, "remove")[2]) == json.dumps(api())
    status, said, _ = attune(after, "bypass")
    assert status == 2 and "no bypass" in said
    body = {"client_id": "me", "prompt": api()}
    _, _, after = attune(body, "insert")
    assert after["client_id"] == "me" and len(after["prompt"]) == len(api()) + 2


def test_api_format_upgrade_and_models_of_another_kind(attune):
    flow = api(**{
        "5": {"inputs": {"model": ["4", 0], "sage_attention": "sageattn3", "allow_compile": False},
              "class_type": "PathchSageAttentionKJ", "_meta": {"title": "Patch"}},
        "20": {"inputs": {"sage_attention": "auto", "model_name": "m"}, "class_type": "DiffusionModelLoaderKJ"},
        "21": {"inputs": {"enable": True, "print_backend": True, "model": ["20", 0]},
               "class_type": "Sage3AttentionOnlySwitch"},
        "22": {"inputs": {"model": ["21", 0]}, "class_type": "KSampler"},
        "30": {"inputs": {"model": ["31", 0]}, "class_type": "WanVideoSampler"},
        "31": {"inputs": {}, "class_type": "WanVideoModelLoader"},
        "32": {"inputs": {"samples": ["30", 0]}, "class_type": "WanVideoDecode"},
    })  # fmt: skip
    _, said, after = attune(flow, "upgrade")
    assert after["5"]["class_type"] == "AttentionSelector" and after["5"]["inputs"]["kernel"] == "sage3"
    assert after["5"]["inputs"]["model"] == ["4", 0] and "allow_compile" not in after["5"]["inputs"]
    assert after["20"]["inputs"]["sage_attention"] == "disabled"
    assert after["21"]["class_type"] == "Sage3Switch" and after["21"]["inputs"]["enable"] is True
    assert after[after["21"]["inputs"]["model"][0]]["inputs"]["model"] == ["20", 0]
    _, said, after = attune(after, "insert")
    assert after["30"] == flow["30"] and after["22"]["inputs"]["model"] == ["21", 0] and "already" in said
    _, _, after = attune(
        api(**{"5": {**flow["5"], "inputs": {"model": ["4", 0], "sage_attention": "disabled"}}}), "upgrade"
    )
    assert "5" not in after and after["3"]["inputs"]["model"] == ["4", 0]


# Files.


def test_a_backup_is_kept_and_none_is_overwritten(attune, tmp_path):
    flow = chain()
    attune(flow, "insert")
    assert json.loads((tmp_path / "é flow.json.bak").read_text("utf-8")) == flow
    _, said, _ = attune(flow, "insert", "--kernel", "sdpa")
    assert (tmp_path / "é flow.json.bak2").exists() and "bak2" in said
    attune(flow, "insert", "--no-backup")
    assert len(list(tmp_path.iterdir())) == 3


def test_another_file_may_be_written_if_it_is_a_workflow(attune, tmp_path):
    flow, out = chain(), tmp_path / "out.json"
    assert attune(flow, "insert", "-o", str(out))[2] == flow
    assert len(selectors(json.loads(out.read_text("utf-8")))) == 1
    assert attune(flow, "bypass", "-o", str(out))[0] == 2
    out.write_text("my diary", "utf-8")
    status, said, _ = attune(flow, "insert", "-o", str(out))
    assert status == 2 and "not overwritten" in said and out.read_text("utf-8") == "my diary"
    (tmp_path / "folder").mkdir()
    assert attune(flow, "insert", "-o", str(tmp_path / "folder"))[0] == 2
    status, said, _ = attune(flow, "insert", "-o", str(tmp_path / "none" / "x.json"))
    assert status == 2 and "there is no" in said


def test_what_is_not_touched_keeps_its_letters(attune, tmp_path):
    given = json.dumps({**chain(), "mine": {"ü": [1.0, 2**80]}}, indent=2, ensure_ascii=False).replace("0.4", "0.40")
    path = tmp_path / "é flow.json"
    attune(given, "insert")
    assert '"version": 0.40' in path.read_text("utf-8")
    path.chmod(0o640)
    attune(path.read_text("utf-8"), "remove")
    assert path.read_text("utf-8") == given
    assert stat.S_IMODE(path.stat().st_mode) in (0o640, 0o666, 0o644)  # Windows has no such bits


def test_inserting_twice_changes_nothing_more():
    flow = chain()
    insert(Book(flow), "auto")
    before = copy.deepcopy(flow)
    assert not insert(Book(flow), "auto").changed and flow == before
    remove(Book(flow), [], [])
    assert flow == chain()
