"""`attune bench --workflow` without a server: reading and converting workflows, settings, figures, files, options."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections import Counter

import pytest
import torch

from comfyui_attune import cli
from comfyui_attune.measure.workflow_bench import Plan, WorkflowBench, _Cell, judge
from comfyui_attune.measure.workflow_convert import to_api
from comfyui_attune.measure.workflow_file import WorkflowError, read_workflow
from comfyui_attune.measure.workflow_graph import prepare
from comfyui_attune.measure.workflow_pictures import Agreement, agreement, ssim
from comfyui_attune.measure.workflow_result import FIELDS, KIND, TOTAL, UNITS, as_csv, empty_row, read_workflow_result
from comfyui_attune.measure.workflow_server import RejectedError, Run, Server, ServerError, _Watch
from comfyui_attune.measure.workflow_table import workflow_table
from comfyui_attune.measure.workflow_widgets import WidgetError, named_values

# What a server says of its nodes (GET /object_info), as far as it is needed.
INT, MODEL, LATENT, IMAGE = ["INT", {}], ["MODEL"], ["LATENT"], ["IMAGE"]
LENGTH = ["INT", {"default": 81, "min": 1, "max": 161, "step": 4}]


def known(outputs: list[str], output_node: bool = False, **inputs) -> dict:
    return {"input": {"required": inputs}, "output": outputs, "output_node": output_node}


INFO = {
    "Loader": known(["MODEL"], name=[["a.safetensors", "b.safetensors"], {}]),
    "Lora": known(["MODEL"], model=MODEL, strength=["FLOAT", {"default": 1.0}]),
    "Empty": known(["LATENT"], width=INT, height=INT, length=LENGTH),
    "Sampler": known(["LATENT"], model=MODEL, seed=INT, steps=INT, latent=LATENT),
    "Decode": known(["IMAGE"], samples=LATENT),
    "SaveVideo": known([], True, images=IMAGE),
    "SaveImage": known(["IMAGE"], True, images=IMAGE),
    "PreviewImage": known(["IMAGE"], True, images=IMAGE),
    "Number": known(["INT"], value=["INT", {"default": 1, "control_after_generate": True}]),
    "AttentionSelector": known(["MODEL"], model=MODEL, kernel=["COMBO", {"options": ["auto", "host", "sdpa"]}]),
    "AttentionBenchmark": known(["IMAGE"], True, model=MODEL),
    "SDPAForce": known(["MODEL"], model=MODEL, first=["COMBO", {"options": ["flash", "math"]}]),
}


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


def video(**more) -> dict:
    """An API prompt: a model, its samples decoded and saved."""
    return {
        "1": node("Loader", name="a.safetensors"),
        "2": node("Empty", width=64, height=32, length=5),
        "3": node("Sampler", model=["1", 0], seed=7, steps=4, latent=["2", 0]),
        "4": node("Decode", samples=["3", 0]),
        "5": node("SaveVideo", images=["4", 0]),
        **more,
    }


# Reading files.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cut off"),
        ('{"nodes": [{"id": 1', "cut off"),
        ("[1]", "found a list"),
        ("{}", "found neither"),
        ('{"last_node_id": 3, "nodes": {}}', "found neither"),
        ('{"1": {"class_type": "A", "inputs": {}}, "2": {"inputs": {}}}', "no class_type in 2"),
        ('{"1": {"class_type": null, "inputs": {}}, "2": {"class_type": "A", "inputs": {}}}', "no class_type in 1"),
    ],
)
def test_what_is_no_workflow_is_told(text, said, tmp_path):
    path = tmp_path / "é x.json"
    path.write_text(text, "utf-8")
    with pytest.raises(WorkflowError, match=said):
        read_workflow(path)
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(WorkflowError, match="not text"):
        read_workflow(path)


def test_both_formats_are_read_and_the_body_of_a_request(tmp_path):
    for data, wanted in (
        (video(), video()),
        ({"prompt": video(), "client_id": "x"}, video()),
        ({"nodes": [], "links": []}, {"nodes": [], "links": []}),
    ):
        (tmp_path / "a.json").write_text(json.dumps(data), "utf-8-sig")
        assert read_workflow(tmp_path / "a.json") == wanted


# What the front end saves, made into what it sends.


def ui(number, kind, values=None, mode=0, outputs=("MODEL",), **inputs) -> dict:
    """A node as the front end saves it; inputs: name=(type, link)."""
    return {
        "id": number, "type": kind, "mode": mode, "widgets_values": values,
        "inputs": [{"name": name, "type": what, "link": link} for name, (what, link) in inputs.items()],
        "outputs": [{"name": what, "type": what} for what in outputs],
    }  # fmt: skip


def chain(mode: int, **more) -> dict:
    """Loader, Lora in `mode`, sampler."""
    return {
        "nodes": [
            ui(1, "Loader", ["b.safetensors"]),
            ui(2, "Lora", [0.5], mode, model=("MODEL", 1)),
            ui(4, "Empty", [64, 32, 5], outputs=("LATENT",)),
            ui(3, "Sampler", [7, "randomize", 4], outputs=("LATENT",), model=("MODEL", 2), latent=("LATENT", 3)),
        ],
        "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"], [3, 4, 0, 3, 1, "LATENT"]],
        **more,
    }


def sent(workflow, **more) -> dict:
    return {key: data["inputs"] for key, data in to_api(workflow, INFO, **more).items()}


def test_values_get_their_names_and_what_a_seed_does_afterwards_is_left_out():
    assert sent(chain(0)) == {
        "1": {"name": "b.safetensors"},
        "2": {"model": ["1", 0], "strength": 0.5},
        "4": {"width": 64, "height": 32, "length": 5},
        "3": {"model": ["2", 0], "seed": 7, "steps": 4, "latent": ["4", 0]},
    }


def test_bypassed_nodes_are_gone_through_and_muted_ones_give_nothing():
    bypassed, muted = sent(chain(4)), sent(chain(2))
    assert "2" not in bypassed and bypassed["3"]["model"] == ["1", 0]
    assert "2" not in muted and "model" not in muted["3"]
    assert sent(chain(4), switch_on=["Lora"])["3"]["model"] == ["2", 0]


def subgraph(values: list, outer_link=None) -> dict:
    """A box with the Lora inside, which shows the strength; its model comes from the loader outside."""
    inside = ui(9, "Lora", [0.5], model=("MODEL", 11), strength=("FLOAT", 12))
    inside["inputs"][1]["widget"] = {"name": "strength"}
    links = [
        {"id": 11, "origin_id": -10, "origin_slot": 0, "target_id": 9, "target_slot": 0, "type": "MODEL"},
        {"id": 12, "origin_id": -10, "origin_slot": 1, "target_id": 9, "target_slot": 1, "type": "FLOAT"},
        {"id": 13, "origin_id": 9, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "MODEL"},
    ]
    definition = {
        "id": "box", "nodes": [inside], "links": links,
        "inputs": [{"name": "model", "type": "MODEL"}, {"name": "power", "type": "FLOAT"}],
        "outputs": [{"name": "model", "type": "MODEL", "linkIds": [13]}],
    }  # fmt: skip
    workflow = chain(0, definitions={"subgraphs": [definition]})
    workflow["nodes"][1] = ui(2, "box", values, model=("MODEL", 1), power=("FLOAT", outer_link))
    return workflow


def test_subgraphs_are_opened_and_the_values_that_they_show_count():
    found = sent(subgraph([0.75]))
    assert found["2:9"] == {"model": ["1", 0], "strength": 0.75} and found["3"]["model"] == ["2:9", 0]
    assert sent(subgraph([]))["2:9"]["strength"] == 0.5, "shown, but never set: what is inside"
    linked = subgraph([0.75], outer_link=20)
    linked["nodes"].append(ui(8, "PrimitiveNode", [0.25, "fixed"], outputs=("FLOAT",)))
    linked["links"].append([20, 8, 0, 2, 1, "FLOAT"])
    assert sent(linked)["2:9"]["strength"] == 0.25
    bypassed = subgraph([0.75])
    bypassed["nodes"][1]["mode"] = 4
    assert sent(bypassed)["3"]["model"] == ["1", 0] and "2:9" not in sent(bypassed)


def test_what_only_the_front_end_has_is_resolved():
    workflow = chain(0)
    workflow["nodes"] += [
        ui(5, "Reroute", None, outputs=("*",), x=("*", 2)),
        ui(6, "SetNode", ["m"], outputs=("*",), MODEL=("MODEL", 5)),
        ui(7, "GetNode", ["m"]),
        ui(8, "MarkdownNote", ["text"]),
    ]
    workflow["links"] = [
        [1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 5, 0, "*"], [5, 5, 0, 6, 0, "MODEL"], [6, 7, 0, 3, 0, "MODEL"],
    ]  # fmt: skip
    workflow["nodes"][3]["inputs"][0]["link"] = 6
    found = sent(workflow)
    assert found["3"]["model"] == ["2", 0] and set(found) == {"1", "2", "3", "4"}


def test_what_cannot_be_converted_says_what_to_do():
    group = chain(0)
    group["nodes"][1]["type"] = "workflow>mine"
    with pytest.raises(WorkflowError, match=r"node 2 .*group node.*Export \(API\)"):
        to_api(group, INFO)
    unknown = chain(0)
    unknown["nodes"][1]["type"] = "Nowhere"
    with pytest.raises(WorkflowError, match=r"does not know Nowhere \(node 2\): install"):
        to_api(unknown, INFO)
    many = chain(0)
    many["nodes"][1]["widgets_values"] = [0.5, 1, 2]
    with pytest.raises(WorkflowError, match=r"node 2 .*has 3 values for it, 2 more"):
        to_api(many, INFO)
    lost = chain(0)
    del lost["nodes"][3]["inputs"][0]["name"]
    with pytest.raises(WorkflowError, match="damaged"):
        to_api(lost, INFO)
    circle = chain(4)
    circle["links"][0] = [1, 2, 0, 2, 0, "MODEL"]
    with pytest.raises(WorkflowError, match="circle"):
        to_api(circle, INFO)


def test_a_choice_brings_inputs_of_its_own_and_what_a_file_lacks_has_its_default():
    options = [{"key": "a", "inputs": {}}, {"key": "b", "inputs": {"required": {"depth": ["INT", {"default": 3}]}}}]
    schema = known([], codec=["COMFY_DYNAMICCOMBO_V3", {"options": options}], last=["STRING", {"default": "x"}])
    assert named_values(schema, ["b", 8, "y"]) == {"codec": "b", "codec.depth": 8, "last": "y"}
    assert named_values(schema, ["a"]) == {"codec": "a", "last": "x"}
    assert named_values(schema, ["b"]) == {"codec": "b", "codec.depth": 3, "last": "x"}
    with pytest.raises(WidgetError, match="'c'"):
        named_values(schema, ["c"])


def test_values_that_the_front_end_adds_are_left_out_or_named():
    mesh = {**known([], True, mesh=MODEL, prefix=["STRING", {}]), "name": "SaveGLB"}
    assert named_values(mesh, ["3d/x", ""]) == named_values(mesh, ["3d/x"]) == {"prefix": "3d/x"}
    with pytest.raises(WidgetError, match="1 more"):
        named_values(mesh, ["3d/x", "", ""])
    boxes = known([], editor=["BOUNDING_BOXES", {"socketless": False}], last=["BOUNDING_BOXES", {"socketless": True}])
    assert named_values(boxes, [[1], [2]]) == {"editor": [1], "last": [2]}
    info = {"CustomCombo": {**known(["STRING", "INT"], choice=["COMBO", {"options": []}]), "name": "CustomCombo"}}
    for values, index in ((["b", 0, "a", "b", ""], 1), (["b", "a", "b", ""], 1), (["c", 0, "a"], -1)):
        (node,) = to_api({"nodes": [ui(1, "CustomCombo", values)], "links": []}, info).values()
        options = values[2:] if isinstance(values[1], int) else values[1:]
        shown = {f"option{number}": option for number, option in enumerate(options, 1)}
        assert node["inputs"] == {"choice": values[0], "index": index, **shown}


def test_a_link_from_outside_where_nothing_is_outside_and_numbers_without_end():
    lost = chain(0)
    lost["links"][0] = [1, -10, 0, 2, 0, "MODEL"]
    assert "model" not in sent(lost)["2"]
    lost["links"][0] = [1, 1, float("inf"), 2, 0, "MODEL"]
    with pytest.raises(WorkflowError, match="damaged"):
        to_api(lost, INFO)


# Settings.


def test_a_selector_is_put_before_what_samples_and_the_prompt_given_stays():
    given = video()
    job = prepare(given, INFO)
    assert given == video()
    prompt = job.variant("sdpa", None, "a")
    (selector,) = job.selectors
    assert prompt["3"]["inputs"]["model"] == [selector, 0]
    assert prompt[selector]["inputs"]["model"] == ["1", 0] and prompt[selector]["inputs"]["kernel"] == "sdpa"
    assert "1 AttentionSelector" in job.notes[0]
    assert prompt["3"]["inputs"]["seed"] == job.variant("host", None, "b")["3"]["inputs"]["seed"] == 7


def test_selectors_that_are_there_are_used_and_nodes_that_would_decide_over_them_go():
    more = {
        "6": node("AttentionSelector", model=["1", 0], kernel="auto", cross_attention="sdpa", min_tokens=99),
        "7": node("SDPAForce", model=["6", 0], first="math"),
    }
    more["8"] = node("AttentionBenchmark", model=["7", 0])
    more["9"] = node("PreviewImage", images=["8", 0])
    given = video(**more)
    given["3"]["inputs"]["model"] = ["7", 0]
    job = prepare(given, INFO)
    assert not {"8", "9"} & set(job.prompt)
    prompt = job.variant("host", None, "a")
    assert job.selectors == ["6"] and "7" not in prompt and prompt["3"]["inputs"]["model"] == ["6", 0]
    inputs = prompt["6"]["inputs"]
    assert (inputs["kernel"], inputs["cross_attention"], inputs["min_tokens"]) == ("host", "same", 0)
    assert any("SDPAForce (7), AttentionBenchmark (8)" in note for note in job.notes)


def test_two_samplers_of_one_model_share_a_selector_and_two_models_do_not():
    one = video(**{"6": node("Sampler", model=["1", 0], seed=1, steps=1, latent=["3", 0])})
    assert len(prepare(one, INFO).selectors) == 1
    two = video(**{
        "6": node("Sampler", model=["7", 0], seed=1, steps=1, latent=["3", 0]),
        "7": node("Lora", model=["1", 0], strength=1.0),
    })  # fmt: skip
    assert len(prepare(two, INFO).selectors) == 2


def test_a_node_that_samples_and_gives_the_model_on_is_reached():
    info = {**INFO, "Sampler": {**INFO["Sampler"], "output": ["MODEL", "LATENT"]}}
    given = video(**{"6": node("Sampler", model=["3", 0], seed=1, steps=1, latent=["3", 1])})
    job = prepare(given, info)
    assert len(job.selectors) == 1 and job.prompt["3"]["inputs"]["model"] == [job.selectors[0], 0]


def test_every_run_is_new_to_the_servers_cache():
    job = prepare(video(), INFO)
    first, second = (job.variant("host", 5, run) for run in ("a", "b"))
    changed = {key for key in first if first[key] != second[key]}
    assert changed == {*job.selectors, "2"}, "the selector, and what makes the latents"


def test_frames_and_size_are_set_where_they_stand():
    linked = video(**{"6": node("Number", value=9)})
    linked["2"]["inputs"]["length"] = ["6", 0]
    job = prepare(linked, INFO)
    prompt = job.variant("host", 13, "a", (832, 1216))
    assert prompt["6"]["inputs"]["value"] == 13 and prompt["2"]["inputs"]["length"] == ["6", 0]
    assert (prompt["2"]["inputs"]["width"], prompt["2"]["inputs"]["height"]) == (832, 1216)
    assert job.said("frames") == 9 and job.said("width") == 64
    square = video(**{"6": node("Number", value=64)})
    square["2"]["inputs"].update(width=["6", 0], height=["6", 0])
    inputs = prepare(square, INFO).variant("host", None, "a", (832, 1216))["2"]["inputs"]
    assert (inputs["width"], inputs["height"]) == (832, 1216)
    worked_out = video(**{"6": node("Decode", samples=["2", 0])})
    worked_out["2"]["inputs"]["length"] = ["6", 0]
    job = prepare(worked_out, INFO)
    assert job.said("frames") is None and job.variant("host", 13, "a")["2"]["inputs"]["length"] == 13


@pytest.mark.parametrize(
    ("frames", "said"),
    [(30, "takes 1, 5, 9, … and would round this number: give 29 or 33"), (165, "up to 161"), (0, "takes 1, 5, 9")],
)
def test_frames_that_a_node_would_round_are_refused(frames, said):
    job = prepare(video(), INFO)
    job.check_frames(81)
    with pytest.raises(WorkflowError, match=said) as error:
        job.check_frames(frames)
    assert "Empty (node 2)" in str(error.value)


def test_without_frames_a_model_or_the_pack_it_is_told():
    picture = video()
    picture["2"] = node("Number", value=1)
    with pytest.raises(WorkflowError, match="no node of the workflow makes a number of frames"):
        prepare(picture, INFO).check_frames(5)
    with pytest.raises(WorkflowError, match="takes a model"):
        prepare({"1": node("Empty", width=64, height=64, length=5)}, INFO)
    with pytest.raises(WorkflowError, match="no ComfyUI-Attune: put the pack"):
        prepare(video(), {name: one for name, one in INFO.items() if name != "AttentionSelector"})
    with pytest.raises(WorkflowError, match="does not know Nowhere"):
        prepare(video(**{"9": node("Nowhere")}), INFO)


def test_pictures_are_compared_before_they_become_a_video_and_only_sampled_ones():
    job = prepare(video(**{"8": node("Empty", width=8, height=8, length=1)}), INFO)
    (tap,) = job.taps
    assert job.added == [tap] and job.prompt[tap]["inputs"]["images"] == ["4", 0]
    assert tap not in job.stages and set(job.stages) == {"2", "3", "4", "5", "8"}
    saved = video(**{
        "6": node("SaveImage", images=["4", 0]),
        "7": node("Decode", samples=["8", 0]), "8": node("Empty", width=8, height=8, length=1),
        "9": node("PreviewImage", images=["7", 0]),
    })  # fmt: skip
    saved["5"] = node("Number", value=1)
    job = prepare(saved, INFO)
    assert job.taps == ["6"] and job.added == [], "what is saved as PNG is good as it is; 9 is of no model"
    del saved["6"]
    assert any("not compared" in note for note in prepare(saved, INFO).notes)


# Figures.


def png(values: torch.Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(values.to(torch.uint8).permute(1, 2, 0).numpy()).save(file, "png")
    return file.getvalue()


def patterns() -> tuple[torch.Tensor, torch.Tensor]:
    i, j = torch.arange(40)[:, None], torch.arange(56)[None, :]
    one = torch.stack([(i * 7 + j * 13) % 256, (i * i + 3 * j) % 256, (i * j) % 256])
    off = torch.stack([(i * j) % 17 - 8, (i + 5 * j) % 23 - 11, (i * 3 + j * j) % 41 - 20])
    return one, (one + off).clamp(0, 255)


def test_ssim_is_that_of_scikit_image():
    # scikit-image 0.26.0: structural_similarity(one, other, channel_axis=0, gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False, data_range=255) of these two pictures in uint8.
    assert ssim(*patterns()) == pytest.approx(0.9818233130235617, abs=1e-12)
    assert ssim(patterns()[0], patterns()[0]) == 1.0
    assert math.isnan(ssim(torch.zeros(3, 10, 40), torch.zeros(3, 10, 40)))


def test_psnr_is_of_all_pictures_together():
    one, other = patterns()
    found = agreement([png(one), png(one)], [png(other), png(one)])
    squares = float(((one - other).double() ** 2).mean()) / 2
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / squares))
    assert found.ssim == pytest.approx((0.9818233130235617 + 1) / 2) and found.largest == 20
    assert agreement([png(one)], [png(one)]) == Agreement(None, 1.0, 0)


def test_what_cannot_be_compared_says_why():
    one, _ = patterns()
    assert "no pictures" in agreement([], [png(one)])
    assert agreement([png(one)], [png(one)] * 2) == "the baseline has 1 pictures, this run 2"
    assert "another size" in agreement([png(one)], [png(one[:, :20])])
    assert "one colour" in agreement([png(one * 0)], [png(one * 0)])


# What the server tells.


def test_times_are_between_the_servers_events():
    watch = _Watch("p", lambda node, what: None)
    events = [
        (1.0, "execution_start", {}),
        (1.5, "execution_cached", {"nodes": ["1"]}),
        (2.0, "executing", {"node": "3"}),
        (4.0, "progress", {"node": "3", "value": 1, "max": 3}),
        (4.1, "executing", {"node": "9", "prompt_id": "somebody else's"}),
        (5.0, "progress", {"node": "3", "value": 2, "max": 3}),
        (6.5, "progress", {"node": "3", "value": 3, "max": 3}),
        (7.0, "executing", {"node": "4.0.1", "display_node": "4"}),
        (8.0, "executing", {"node": "4"}),
    ]
    for at, kind, data in events:
        assert not watch.take(at, kind, {"prompt_id": "p", **data})
    assert watch.take(10.0, "execution_success", {"prompt_id": "p"})
    run = watch.run
    assert (run.status, run.seconds, run.nodes, run.cached) == ("success", 9.0, {"3": 5.0, "4": 3.0}, {"1"})
    assert run.steps == {"3": (3, 1.25)}, "between the steps: loading the model is before the first"


def test_an_error_is_told_with_its_node():
    watch = _Watch("p", lambda node, what: None)
    watch.take(1.0, "execution_start", {"prompt_id": "p"})
    said = {
        "prompt_id": "p",
        "node_type": "Sampler",
        "node_id": "3",
        "exception_message": "CUDA out of memory.\n Tried",
    }
    assert watch.take(2.0, "execution_error", said)
    assert watch.run.status == "error" and watch.run.reason == "Sampler (node 3): CUDA out of memory. Tried"


# Rows.


def ran(seconds=10.0, status="success", reason="", **nodes) -> Run:
    return Run("p", status, reason, seconds, {key[1:]: value for key, value in nodes.items()}, {"1"}, {"3": (4, 0.5)})


class FakeServer:
    """Stands for a server: gives the runs that a test names, in turn."""

    def __init__(self, *runs):
        self.left, self.prompts = list(runs), []

    def get(self, path):
        if path == "/system_stats":
            return {"system": {"comfyui_version": "0.30.0", "argv": ["main.py", "--cpu", "--port", "1"]}, "devices": []}
        kernel = self.prompts[-1]["attune1"]["inputs"]["kernel"]
        node = {"refused": [{"kernel": "sage3", "reasons": ["needs sm_120"]}]}
        observed = {"host" if kernel == "sage3" else kernel: 8}
        return {"runs": [{"prompt_id": "p", "observed": observed, "sampler_node": "3", "nodes": {"attune1": node}}]}

    def run(self, prompt, told):
        self.prompts.append(prompt)
        found = self.left.pop(0) if self.left else ran(_3=8.0, _4=1.0)
        if isinstance(found, BaseException):
            raise found
        return found

    def fetch(self, path):
        raise OSError("there are no files here")


def measure(*runs, kernels=("host", "sdpa"), frames=(5,), **more):
    server, said = FakeServer(*runs), []
    plan = Plan("é", kernels, frames, **more)
    bench = WorkflowBench(server, prepare(video(), INFO), plan, lambda *_: None, said.append)
    result = bench.run()
    assert result["interrupted"] or bench.done == plan.runs == len(server.prompts)
    return result, server


def totals(result) -> dict:
    return {(row["kernel"], row["frames"]): row for row in result["rows"] if row["stage"] == TOTAL}


def test_the_baseline_is_run_untimed_before_each_length_and_other_kernels_once():
    _, server = measure(kernels=("host", "sdpa", "split"), frames=(5, 9), repeats=2)
    order = [(one["attune1"]["inputs"]["kernel"], one["2"]["inputs"]["length"]) for one in server.prompts]
    warm, round_5 = [("host", 5), ("sdpa", 5), ("split", 5)], [("host", 5), ("sdpa", 5), ("split", 5)]
    marks = [one["2"]["inputs"]["attune_run"] for one in server.prompts]
    assert len(set(marks)) == len(marks)
    assert order == [*warm, *round_5 * 2, ("host", 9), *[(name, 9) for name, _ in round_5] * 2]


def test_rows_hold_the_median_of_the_timed_runs_without_what_is_added():
    runs = [ran(99), ran(99), ran(10, _3=8.0, _attune2=1.0), ran(6), ran(20, _3=16.0), ran(6), ran(12, _3=9.0), ran(6)]
    result, _ = measure(*runs, repeats=3)
    host = totals(result)["host", 5]
    assert host["seconds"] == statistics.median([9, 20, 12]) and host["repeats"] == 3
    assert (host["low_seconds"], host["high_seconds"]) == (10.5, 16.0)
    (sampler,) = [row for row in result["rows"] if row["kernel"] == "host" and row["node"] == "3"]
    assert (sampler["seconds"], sampler["steps"], sampler["seconds_per_step"]) == (9.0, 4, 0.5)
    assert (host["width"], host["height"], host["observed"]) == (64, 32, "host 24")
    assert all(list(row) == list(FIELDS) for row in result["rows"])
    assert "host" in workflow_table(result) and "33.3%" not in workflow_table(result)


def test_a_failed_run_is_a_row_with_its_reason_and_not_the_end():
    failed = ran(1, "error", "Sampler (node 3): out of memory")
    result, _ = measure(ran(), ran(), failed, ran(), frames=(5, 9))
    found = totals(result)
    assert found["host", 5]["status"] == "failed" and "out of memory" in found["host", 5]["reason"]
    assert found["sdpa", 5]["status"] == found["host", 9]["status"] == "measured"
    assert "host: failed: Sampler (node 3): out of memory" in workflow_table(result)
    some, _ = measure(ran(), ran(), failed, ran(), repeats=2)
    assert totals(some)["host", 5]["status"] == "measured"
    assert totals(some)["host", 5]["reason"].startswith("1 of 2 runs failed: Sampler")


def test_what_was_not_run_as_asked_has_no_speed():
    result, _ = measure(kernels=("host", "sage3"))
    row = totals(result)["sage3", 5]
    assert row["status"] == "other kernel" and "of 8 calls 8 on host (sage3: needs sm_120)" in row["reason"]
    (line,) = [line for line in workflow_table(result).splitlines() if line.startswith("  sage3 ")]
    assert " x " not in line


@pytest.mark.parametrize(
    ("kernel", "observed", "status", "said"),
    [
        ("host", {"host": 4}, "measured", ""),
        ("flash", {"flash2": 4}, "measured", ""),
        ("auto", {"sdpa": 2, "host": 2}, "measured", ""),
        ("sdpa", {"sdpa": 3, "host": 1}, "measured", "of 4 calls 1 on host"),
        ("sdpa", {"host": 4}, "other kernel", "of 4 calls 4 on host"),
        ("sdpa", {}, "failed", "ATTUNE=off"),
    ],
)
def test_what_ran_is_held_against_what_was_asked(kernel, observed, status, said):
    found = judge(kernel, _Cell(runs=[ran()], observed=Counter(observed)))
    assert found[0] == status and said in found[1] and bool(said) == bool(found[1])


def test_an_interrupt_leaves_what_was_measured():
    result, _ = measure(ran(), ran(), ran(10), KeyboardInterrupt(), frames=(5, 9))
    assert result["interrupted"] == "Ctrl+C" and list(totals(result)) == [("host", 5)]
    assert "Incomplete: Ctrl+C" in workflow_table(result)
    gone, _ = measure(ran(), ran(), ran(10), ServerError("it is gone"))
    assert gone["interrupted"] == "it is gone" and list(totals(gone)) == [("host", 5)]
    nothing, _ = measure(KeyboardInterrupt())
    assert nothing["rows"] == [] and "Nothing was measured" in workflow_table(nothing)


def test_a_prompt_that_is_never_accepted_ends_it_and_a_later_one_is_a_row():
    with pytest.raises(RejectedError):
        measure(RejectedError("no such model"))
    result, _ = measure(ran(), ran(), RejectedError("too long"))
    assert totals(result)["host", 5]["reason"] == "the server does not accept it: too long"


def test_a_baseline_that_differs_from_itself_is_told():
    result = result_of(host=10.0, sdpa=8.0)
    assert "not identical with itself" not in workflow_table(result)
    result["rows"][0]["largest_difference"] = 3
    assert "host is not identical with itself (at 5 frames 64x32)" in workflow_table(result)


def test_where_the_pack_records_nothing_it_ends_at_once():
    class Silent(FakeServer):
        def get(self, path):
            return {"runs": []} if path == "/attune/runs" else super().get(path)

    server = Silent()
    plan = Plan("x", ("host", "sdpa"), (5,))
    with pytest.raises(WorkflowError, match="ATTUNE=off"):
        WorkflowBench(server, prepare(video(), INFO), plan, lambda *_: None, lambda _: None).run()
    assert len(server.prompts) == 1


# Files.


def result_of(**seconds) -> dict:
    rows = []
    for kernel, value in seconds.items():
        times = {"seconds": value, "low_seconds": value * 0.99, "high_seconds": value * 1.01, "repeats": 3}
        about = {"workflow": "é", "kernel": kernel, "frames": 5, "width": 64, "height": 32, "status": "measured"}
        rows.append(empty_row(**about, stage=TOTAL, ssim=0.5, **times))
        rows.append(empty_row(**about, stage="Sampler", node="3", steps=4, seconds_per_step=0.5, **times))
        rows.append(empty_row(**about, stage="Decode", node="4", **times))
    machine = dict.fromkeys(("comfyui", "torch", "python", "system", "flags"), "1") | {
        "device": "A GPU", "memory_bytes": 2**34,
    }  # fmt: skip
    return {"kind": KIND, "schema": 1, "units": UNITS, "machine": machine, "baseline": "host", "notes": [],
            "interrupted": "", "rows": rows}  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """save(result, "a.csv"): a file with it, as JSON or CSV by its name."""

    def one(result, name):
        path = tmp_path / f"é {name}"
        path.write_text(as_csv(result) if name.endswith("csv") else json.dumps(result), "utf-8", newline="")
        return path

    return one


def test_json_and_csv_say_the_same(save):
    result = result_of(host=10.0, sdpa=8.0)
    of_json, of_csv = (read_workflow_result(save(result, name)) for name in ("a.json", "a.csv"))
    assert of_json["rows"] == of_csv["rows"] and len(of_csv["rows"]) == 4, "whole runs and samplers"
    lines = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert [line["seconds"] for line in lines][:2] == ["10.0", "10.0"] and lines[0]["machine_device"] == "A GPU"


def test_compare_takes_two_of_them(save, capsys):
    a, b = save(result_of(host=10.0, sdpa=8.0), "a.csv"), save(result_of(host=10.0, sdpa=4.0), "b.json")
    assert cli.main(["compare", str(a), str(b), "--fail-under", "0.9"]) == 0
    text = capsys.readouterr().out
    assert "2.000  faster" in text and "1.000  within the spread" in text and "Sampler 3" in text
    assert "no difference between the machines" in text
    assert cli.main(["compare", str(b), str(a), "--fail-under", "0.9"]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "damaged or cut off"),
        (lambda text: text.replace("measured", "perhaps", 1), "status 'perhaps'"),
        (lambda text: text.replace("10.0", "-1.0"), "damaged"),
        (lambda text: text.replace("10.0", "nan"), "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_damaged_files_are_refused(change, said, name, save, capsys):
    path = save(result_of(host=10.0), name)
    path.write_text(change(path.read_text("utf-8")).replace("nan", "NaN" if "json" in name else "nan"), "utf-8")
    assert cli.main(["compare", str(path), str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_workflows_result_is_not_compared_with_one_of_single_calls(save, capsys):
    from test_compare import result, row

    from comfyui_attune.measure import bench_file

    path = save(result_of(host=10.0), "a.json")
    other = path.with_name("calls.json")
    other.write_text(bench_file.as_json(result(row())), "utf-8")
    assert cli.main(["compare", str(path), str(other)]) == 2
    assert "compare two of one kind" in capsys.readouterr().err


# The command.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kernels", "sdpa,foo"], "unknown kernel foo"),
        (["--frames", "25,x"], "wanted whole numbers"),
        (["--frames", "0"], "wanted whole numbers above 0"),
        (["--size", "832"], "wanted width x height"),
        (["--repeats", "0"], "wanted 1 or more"),
        (["--shape", "1,2,3,4,5"], "--shape: means nothing beside --workflow"),
        (["--memory", "--plot", "a.png"], "--memory, --plot: means nothing beside --workflow"),
        (["--csv", "nowhere/a.csv"], "there is no folder"),
    ],
)
def test_wrong_options_are_told_before_anything_is_asked_of_a_server(options, said, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(video()), "utf-8")
    assert cli.main(["bench", "--workflow", str(path), "--server", "http://127.0.0.1:1", *options]) == 2
    assert said in capsys.readouterr().err


def test_options_of_workflows_alone_mean_nothing(capsys):
    assert cli.main(["bench", "--frames", "5", "--server", "x"]) == 2
    assert "--frames, --server: means nothing without --workflow" in capsys.readouterr().err


def test_without_a_server_it_says_how_to_start_one(tmp_path, capsys):
    from attune_devtools.host import free_port

    path = tmp_path / "a.json"
    path.write_text(json.dumps(video()), "utf-8")
    assert cli.main(["bench", "--workflow", str(path), "--server", f"127.0.0.1:{free_port()}"]) == 2
    assert "start it (python main.py" in capsys.readouterr().err
    assert cli.main(["bench", "--workflow", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_a_server_that_goes_away_is_told():
    server = Server("127.0.0.1:9/")
    assert server.url == "http://127.0.0.1:9"
    server.post = lambda path, data: {"prompt_id": "p"}
    server._messages.put((1.0, "closed", "the connection was closed"))
    with pytest.raises(ServerError, match=r"is gone .*look into its log"):
        server.run(video(), lambda node, what: None)
