"""AttentionBenchmark and AttentionCapture in a real ComfyUI, through its API."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import re
import sys
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from comfyui_attune.attention.call import AttentionCall, Mask
from comfyui_attune.kernels import KERNELS
from comfyui_attune.measure.bench_file import FIELDS, read_result
from comfyui_attune.measure.shapes import SETS
from support.prompts import behind, latent, node, picture, selector, two_stage
from support.server import PromptFailedError, PromptRejectedError

EXACT_KERNELS = [*(kernel.name for kernel in KERNELS if kernel.exact), "sub_quad", "basic"]
INPUTS = ["shapes", "kernels", "seconds", "dtype", "seed", "model", "positive", "negative", "latent"]
CONNECTED = {"model": ["10", 0], "positive": ["5", 0], "negative": ["6", 0], "latent": ["7", 0]}


def bench(**inputs) -> dict:
    defaults = {"shapes": "from the model", "kernels": "exact", "seconds": 0.1, "dtype": "auto", "seed": 0}
    return node("AttentionBenchmark", **{**defaults, **inputs})


def without_sampling(prompt: dict) -> dict:
    """The prompt without its samplers and what comes after them."""
    return {key: data for key, data in prompt.items() if key not in ("12", "13", "14")}


def csv_files(server) -> list[Path]:
    return sorted((server.base / "output" / "attune").glob("bench_*.csv"))


def captures(server) -> list[Path]:
    return sorted((server.base / "output" / "attune").glob("*.safetensors"))


def listen(server, prompt, until) -> str:
    """Queue `prompt` as a browser does, and hear the server's messages until `until(type, data)`; the prompt's id."""
    client = uuid.uuid4().hex

    async def hear() -> str:
        address = f"{server.url.replace('http', 'ws', 1)}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            identity = await asyncio.to_thread(server.submit, prompt, client)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    what = json.loads(message.data)
                    if until(what["type"], what["data"]):
                        return identity
        raise AssertionError("the server closed the connection")

    with ThreadPoolExecutor(1) as thread:  # playwright's loop may run in this one
        return thread.submit(asyncio.run, asyncio.wait_for(hear(), 90)).result()


# AttentionBenchmark


def test_its_face_in_the_node_library(server):
    info = server.object_info()["AttentionBenchmark"]
    assert info["category"] == "attention" and info["output_node"] and len(info["description"]) > 40
    assert (info["output"], info["output_name"]) == (["IMAGE", "STRING", "STRING"], ["plot", "table", "csv_path"])
    inputs = {**info["input"]["required"], **info["input"]["optional"]}
    assert list(inputs)[: len(INPUTS)] == INPUTS
    assert list(info["input"]["required"]) == INPUTS[:5], "without a model it runs on a set of shapes"
    assert all(spec[1].get("tooltip") for spec in inputs.values())
    assert inputs["shapes"][1]["options"] == ["from the model", *SETS]


def test_a_models_own_shapes_are_measured_and_the_model_stays_as_it_was(server):
    clean = latent(server.run(two_stage()))
    prompt = two_stage(lambda p, m, stage: selector(p, m, str(20 + stage), "split"))
    prompt["40"] = bench(kernels="all", **CONNECTED)
    prompt["41"] = node("SaveImage", images=["40", 0], filename_prefix="tests/bench")
    prompt["42"] = node("PreviewAny", source=["40", 1])
    prompt["43"] = node("PreviewAny", source=["40", 2])
    result = server.run(prompt)
    assert [run["sampler_node"] for run in result.runs] == ["12", "13"], "the step that was watched is no run of a node"
    assert torch.allclose(latent(result), clean, atol=1e-4)
    (text,), (path,) = result.outputs["42"]["text"], result.outputs["43"]["text"]
    assert result.outputs["40"]["text"] == [text]
    assert "One step of WAN21:\n  WAN21 cross: batch 2, 2 heads of 128, 32 x 77 tokens, ×2\n" in text
    assert "  WAN21 self: batch 2, 2 heads of 128, 32 x 32 tokens, ×2" in text
    measured = read_result(Path(path))
    rows = [row for row in measured["rows"] if row["status"] == "measured"]
    assert {row["kernel"] for row in rows} == {"sdpa", "sdpa_flash", "sdpa_math", "split", "sub_quad", "basic"}
    assert len(rows) == 12 and all(row["verdict"] == "works" and row["dtype"] == "float32" for row in rows)
    refused = {row["kernel"]: row["reason"] for row in measured["rows"] if row["status"] != "measured"}
    assert "needs a cuda device" in refused["sage3"]
    (saved,) = (file for file in result.files if file.suffix == ".png")
    (shown,) = result.outputs["40"]["images"]
    with Image.open(saved) as image, Image.open(result.base / "temp" / shown["filename"]) as face:
        assert image.size == face.size and image.size[0] > 1000
        pixels = numpy.array(image.convert("RGB"))
    assert (pixels[2:-2, 2:-2] == (0x00, 0x72, 0xB2)).all(axis=2).sum() > 1000, "no bar in the colour of sdpa"


def test_it_is_not_measured_again_before_an_input_changes(server):
    prompt = without_sampling(two_stage())
    prompt["40"] = bench(seed=71, **CONNECTED)
    server.run(prompt)
    before = csv_files(server)
    assert "40" in server.run(prompt).cached and csv_files(server) == before
    prompt["40"]["inputs"]["seed"] = 72
    assert "40" not in server.run(prompt).cached
    assert len(csv_files(server)) == len(before) + 1


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("flux", [r"Flux self: batch 1, 2 heads of 128, 93 x 93 tokens, ×4"]),
        ("sd3", [r"SD3 self: batch 2, 2 heads of 64, 93 x 93 tokens, ×2"]),
        ("sd15", [r"BaseModel self: batch 2, 8 heads of 40, 64 x 64 tokens, ×3", r"cross: .* 64 x 77 tokens, ×3"]),
    ],
)
def test_the_shapes_of_other_models(server, family, wanted):
    prompt = without_sampling(picture(family))
    negative = {} if family == "flux" else {"negative": ["6", 0]}
    prompt["40"] = bench(model=["1", 0], positive=["5", 0], latent=["7", 0], **negative)
    (text,) = server.run(prompt).outputs["40"]["text"]
    assert all(re.search(line, text) for line in wanted), text


def test_it_shows_how_far_it_is_and_stopped_it_writes_what_was_measured(server):
    """Alone on a graph, on a set of shapes."""
    server.run({"1": node("AttentionDoctor")})  # the verdicts are there
    before = csv_files(server)
    prompt = {"40": bench(shapes="smoke", seconds=5.0, seed=5)}
    values = []

    def second_row(kind, data):
        if kind == "progress":
            values.append((data["value"], data["max"], data["node"]))
        return kind == "progress" and data["value"] >= 1

    identity = listen(server, prompt, second_row)
    server.interrupt()
    result = server.wait(identity)
    assert result.history["status"]["messages"][-1][0] == "execution_interrupted"
    assert values[0][0] == 0 and values[-1][1:] == (5 * len(EXACT_KERNELS), "40")
    (written,) = set(csv_files(server)) - set(before)
    rows = read_result(written)["rows"]
    assert 1 <= len(rows) < 10 and rows[0]["shape"] == "wan 256x256 25f self" and rows[0]["status"] == "measured"


def test_it_is_stopped_between_two_calls_not_between_two_rows(server):
    prompt = {"40": bench(shapes="smoke", seconds=60.0, seed=6)}
    identity = listen(server, prompt, lambda kind, data: kind == "progress")
    server.interrupt()
    result = server.wait(identity, seconds=45)  # the first row takes a minute
    assert result.history["status"]["messages"][-1][0] == "execution_interrupted"


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({}, "needs model, positive, latent; not connected: model, positive, latent"),
        ({"model": ["1", 0]}, "not connected: positive, latent. Connect what the sampler has there, or choose one of"),
    ],
)
def test_what_is_missing_is_named(server, inputs, wanted):
    with pytest.raises(PromptFailedError, match=re.escape(wanted)):
        server.run({"1": two_stage()["1"], "40": bench(**inputs)})


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({"shapes": "wan9"}, "wan9"),
        ({"seconds": 0.0}, "seconds"),
        ({"kernels": "best"}, "kernels"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(server, inputs, wanted):
    with pytest.raises(PromptRejectedError) as caught:
        server.run({"40": bench(**{"shapes": "smoke", **inputs})})
    assert wanted in str(caught.value.node_errors["40"])


# AttentionCapture


def capture(prompt, model, key, **inputs):
    defaults = {"blocks": "0", "steps": "0", "kind": "both", "max_mib": 64, "filename_prefix": "attune/capture"}
    return behind(prompt, model, key, "AttentionCapture", **{**defaults, **inputs})


def test_both_stages_are_captured_beside_selectors_and_the_latent_is_the_same(server):
    def select(prompt, model, stage):
        return selector(prompt, model, str(20 + stage), "split")

    def with_capture(prompt, model, stage):
        if stage:  # once before and once behind the selector
            return select(prompt, capture(prompt, model, "31", steps="1", kind="cross"), stage)
        return capture(prompt, select(prompt, model, stage), "30")

    clean = latent(server.run(two_stage(select)))
    before = captures(server)
    prompt = two_stage(with_capture)
    prompt["40"] = node("AttentionReport", value=["13", 0])
    result = server.run(prompt)
    assert torch.equal(latent(result), clean)
    assert [run["observed"] for run in result.runs] == [{"split": 8}, {"split": 8}]
    first, second = (file for file in captures(server) if file not in before)
    assert {name.rpartition(".")[0] for name in load_file(first)} == {"step00.block00.self", "step00.block00.cross"}
    assert {name.rpartition(".")[0] for name in load_file(second)} == {"step01.block00.cross"}
    (text,) = result.outputs["40"]["text"]
    assert first.name in text.replace("\n", "").replace(" ", "") and second.name in text.replace("\n", "").replace(
        " ", ""
    )
    assert "AttentionCapture (node 30): Wrote 2 calls" in server.output() and str(first) in server.output()


def test_a_cached_node_captures_the_next_run_and_a_removed_one_nothing(server):
    prompt = two_stage(lambda p, m, stage: m if stage else capture(p, m, "30"))
    before = len(captures(server))
    for seed in (81, 82):
        prompt["12"]["inputs"]["noise_seed"] = seed
        result = server.run(prompt)
    assert "30" in result.cached and len(captures(server)) == before + 2
    plain = two_stage()
    plain["12"]["inputs"]["noise_seed"] = 82
    assert torch.equal(latent(server.run(plain)), latent(result))
    assert len(captures(server)) == before + 2


def test_the_node_tells_the_browser_which_file_it_wrote(server):
    told = []

    def ended(kind, data):
        if kind == "attune.status" and "30" in data["nodes"]:
            told.append(data)
        return kind == "execution_success"

    prompt = two_stage(lambda p, m, stage: selector(p, m, "20", "split") if stage else capture(p, m, "30", kind="self"))
    prompt["12"]["inputs"]["noise_seed"] = 91
    identity = listen(server, prompt, ended)
    (run,) = told
    assert (run["prompt_id"], run["sampler_node"], run["status"]) == (identity, "12", "finished")
    assert run["nodes"]["30"]["node_type"] == "AttentionCapture"
    file = captures(server)[-1]
    assert run["nodes"]["30"]["text"].splitlines() == [
        f"Wrote 1 call (0.2 MiB) to attune/{file.name} in ComfyUI's output folder.",
        f'Measure with: attune bench --inputs "{file}"',
    ]


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({"steps": "first"}, "steps: 'first' is no step. Wanted steps counted from 0"),
        ({"steps": "9-3"}, "steps: '9-3' is no step"),
        ({"blocks": "a-b"}, "blocks: 'a-b' is not a block range"),
        ({"max_mib": 0}, "max_mib"),
        ({"kind": "all"}, "kind"),
    ],
)
def test_bad_input_to_capture_is_refused_before_anything_runs(server, inputs, wanted):
    with pytest.raises(PromptRejectedError) as caught:
        server.run(two_stage(lambda p, m, stage: capture(p, m, str(30 + stage), **inputs)))
    assert wanted in caught.value.node_errors["30"]["errors"][0]["details"] or wanted in str(caught.value.node_errors)


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({"blocks": "2"}, "blocks: the block range '2' goes beyond the model.*This model has 2 blocks"),
        ({"filename_prefix": "../../x"}, r"filename_prefix '../../x' cannot be used .*outside the output folder"),
        ({"filename_prefix": "taken/x"}, r"nothing can be written to .* under 'taken/x'"),
        ({"filename_prefix": " "}, r"filename_prefix ' ' holds no name"),
    ],
)
def test_what_only_the_run_can_tell_stops_before_sampling(server, inputs, wanted):
    (server.base / "output" / "taken").write_text("no folder", "utf-8")
    with pytest.raises(PromptFailedError, match=wanted) as caught:
        server.run(two_stage(lambda p, m, stage: capture(p, m, str(30 + stage), **inputs)))
    assert caught.value.node_id == "30"


# In this process


@pytest.fixture(scope="module")
def host(comfy):
    """host/benchmark.py, importable once ComfyUI is."""
    from comfyui_attune.host import benchmark

    return benchmark


@pytest.fixture(scope="module")
def wan(host, models):
    import comfy.sd

    name = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
    return comfy.sd.load_diffusion_model(str(models / "diffusion_models" / name))


@pytest.fixture(scope="module")
def host_nodes(comfy):
    """ComfyUI's own module `nodes`, which this process knows by another name."""
    spec = importlib.util.spec_from_file_location("nodes", comfy / "nodes.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nodes", module)
        spec.loader.exec_module(module)
        yield module


def watch(host, model):
    text = [[torch.zeros(1, 6, 768), {}]]
    return host.watch_one_step(model, text, text, {"samples": torch.zeros(1, 16, 2, 8, 8)}, seed=0)


SELF, CROSS = (2, 2, 32, 32, 128), (2, 2, 32, 6, 128)


def numbers(watcher) -> dict:
    return {(c.batch, c.heads, c.q_len, c.kv_len, c.head_dim): n for c, n in blocks_apart(watcher.calls).items()}


def blocks_apart(calls):
    """Calls without their block."""
    found = Counter()
    for call, count in calls.items():
        found[dataclasses.replace(call, block=None)] += count
    return found


def no_compiler(_module, _inputs):
    raise AssertionError("compiled for one step")


def test_another_packs_override_is_called_and_a_compiled_model_is_seen(host, wan, host_nodes):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    called = []

    def override(func, *args, **kwargs):
        called.append(1)
        return func(*args, **kwargs)

    model = wan.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    set_torch_compile_wrapper(model, backend=no_compiler)
    assert numbers(watch(host, model)) == {SELF: 2, CROSS: 2}
    assert len(called) == 4


def test_blocks_that_another_pack_compiled_are_seen(host, wan, host_nodes, monkeypatch):
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.wan.model as module

    monkeypatch.setattr(module, "optimized_attention", attention.attention_pytorch)  # it breaks no graph
    model = wan.clone()
    block = model.get_model_object("diffusion_model.blocks.0")
    model.add_object_patch("diffusion_model.blocks.0", torch.compile(block, backend=no_compiler))
    assert numbers(watch(host, model)) == {SELF: 2, CROSS: 2}


def test_calls_without_options_are_seen_and_nothing_is_left_behind(host, wan, host_nodes, monkeypatch):
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.wan.model as module

    from comfyui_attune.attention.session import CURRENT

    def forward(self, x, *_args, **_kwargs):
        q = torch.zeros(1, 5, 24)
        attention.optimized_attention(q, q, q, 3)
        return x

    monkeypatch.setattr(module.WanModel, "forward", forward)
    watcher = watch(host, wan)
    assert numbers(watcher) == {(1, 3, 5, 5, 8): 1}
    attention.optimized_attention(torch.zeros(1, 5, 24), torch.zeros(1, 5, 24), torch.zeros(1, 5, 24), 3)
    assert numbers(watcher) == {(1, 3, 5, 5, 8): 1} and CURRENT.get() is None


def test_what_cannot_be_measured_as_it_is_is_said(host):
    call = AttentionCall(1, 8, 8, 64, 64, 40, 40, torch.float16, "cuda:0")
    few = dataclasses.replace(call, kv_heads=2, q_len=32, kv_len=77)
    odd = dataclasses.replace(call, v_dim=80)
    masked = dataclasses.replace(call, mask=Mask("float", (1, 1, 64, 64)), dtype=torch.bfloat16)
    cases, lines = host.cases_of("Flux", {call: 3, few: 2, odd: 4, masked: 1}, strange=5)
    assert [(one.shape.name, one.shape.numbers, one.dtype) for one in cases] == [
        ("Flux self", (1, 8, 64, 64, 40), torch.float16),
        ("Flux cross", (1, 8, 32, 77, 40), torch.float16),
        ("Flux self 2", (1, 8, 64, 64, 40), torch.bfloat16),
    ]
    assert lines[-4:] == [
        "  left out, not to be understood: ×5",
        "  measured without their mask: ×1",
        "  measured with keys for each head, though heads share them: ×2",
        "  left out, with values of another dimension than keys: ×4",
    ]


def test_of_many_shapes_the_largest_are_measured(host):
    calls = {AttentionCall(1, 1, 1, n, n, 8, 8, torch.float16, "cpu"): 1 for n in range(10, 110, 10)}
    cases, lines = host.cases_of("M", calls)
    assert [one.shape.q_len for one in cases] == [100, 90, 80, 70, 60, 50, 40, 30]
    assert "2 smaller shapes, 1.3% of the work, are not measured." in lines[-1]


def test_without_matplotlib_and_without_figures_there_is_a_picture_that_says_so(host, monkeypatch):
    result = {"rows": [], "machine": {}}
    assert host._picture(result, "").shape == (160, 1200, 3)

    def missing(*_):
        raise ImportError("no matplotlib")

    monkeypatch.setattr(host, "save_plot", missing)
    pixels = host._picture(result, "")
    assert pixels.shape == (160, 1200, 3) and pixels.min() < 100


def test_a_csv_that_cannot_be_written_costs_nothing_else(host, monkeypatch, tmp_path):
    row = {name: "" for name in FIELDS}
    facts = ("device", "architecture", "threads", "driver", "torch", "cuda", "triton", "python", "system")
    machine = dict.fromkeys(facts, "")
    result = {"rows": [row], "machine": {**machine, "packages": {}}}
    path, said = host._save(result, tmp_path / "gone" / "x.csv")
    assert path == "" and "could not be written" in said
    assert host._save({"rows": []}, tmp_path / "x.csv") == ("", "")


@pytest.mark.parametrize("name", ["capture", "benchmark"])
def test_what_is_no_model_is_said(host, name):
    from comfyui_attune.nodes.benchmark import AttentionBenchmark
    from comfyui_attune.nodes.capture import AttentionCapture

    class WanVideoModel:
        pass

    with pytest.raises(ValueError, match=r"type WanVideoModel cannot .*: wanted a ComfyUI MODEL"):
        if name == "capture":
            AttentionCapture.execute(WanVideoModel())
        else:
            AttentionBenchmark.execute(model=WanVideoModel(), positive=[], latent={})


def test_attune_off_captures_nothing(host, wan, monkeypatch):
    from comfyui_attune.nodes.capture import AttentionCapture

    monkeypatch.setenv("ATTUNE", "off")
    assert AttentionCapture.execute(wan).args == (wan,)
