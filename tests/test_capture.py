"""AttentionCapture on real ComfyUI models in this process: what is in its files, and that the run is untouched."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfyui_attune.attention.policy import BlockRange, Rule
from comfyui_attune.measure.bench_inputs import read_captured
from support.loading import ROOT

FIRST = BlockRange(0, 0)


@pytest.fixture(scope="module")
def host(comfy):
    """The pack's modules of the node, importable once ComfyUI is."""
    from comfyui_attune.host import capture, captured_run, comfyui

    class Host:
        OVERRIDE = "optimized_attention_override"
        attach = staticmethod(comfyui.attach)

        @staticmethod
        def capture(model, blocks=FIRST, steps=((0, 0),), kind=None, size=1 << 30, prefix="attune/capture"):
            wanted = captured_run.Wanted(blocks, steps, kind, size, prefix)
            return capture.add_capture(model, wanted, "7", comfyui.count_blocks(model)[0])

    return Host


@pytest.fixture
def folder(host, monkeypatch, tmp_path):
    """ComfyUI's output folder, for one test."""
    import folder_paths

    place = tmp_path / "aus gabe ö"
    place.mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(place))
    return place / "attune"


def load(models, name):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(models / "diffusion_models" / name))


@pytest.fixture(scope="module")
def wan(host, models):
    return load(models, "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors")


def sample(model, steps=4, channels=16, sampler="euler", cfg=2.0, frames=True, words=(6, 6), callback=None):
    """A latent of a tiny model, always from the same noise."""
    import comfy.sample

    generator = torch.Generator().manual_seed(0)
    latent = torch.zeros(1, channels, 2, 8, 8) if frames else torch.zeros(1, channels, 8, 8)
    noise = torch.randn(latent.shape, generator=generator)
    texts = [
        [[torch.randn(1, count, 768, generator=generator), {"pooled_output": torch.zeros(1, 768)}]] for count in words
    ]
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", *texts, latent, seed=1, disable_pbar=True, callback=callback
    )


def spied(host, model):
    """A clone whose own override, of another pack, keeps what it is given: {(forward, block, kind): (q, k, v)}."""
    seen, model = {}, model.clone()

    def override(func, q, k, v, heads, *args, **kwargs):
        block = kwargs["transformer_options"]["block_index"]
        kind = "self" if q.shape[1] == k.shape[1] else "cross"
        forward = sum(key[1:] == (block, kind) for key in seen)
        seen[forward, block, kind] = tuple(t.view(*t.shape[:2], heads, -1).transpose(1, 2).clone() for t in (q, k, v))
        return func(q, k, v, heads, *args, **kwargs)

    model.model_options["transformer_options"][host.OVERRIDE] = override
    return model, seen


def names(file: Path) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in load_file(file)})


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "AttentionCapture (node 7)" in record.getMessage()]


# What is in the file


def test_the_file_holds_the_very_tensors_and_the_run_is_bit_equal(host, wan, folder):
    model, seen = spied(host, wan)
    clean = sample(wan)
    out = sample(host.capture(model, BlockRange(1, 1), ((0, 0), (2, 3))))
    assert torch.equal(out, clean)
    (file,) = files(folder)
    assert file.name == "capture_00001_.safetensors"
    tensors = load_file(file)
    wanted = {
        f"step{step:02}.block01.{kind}.{part}": seen[step, 1, kind][place]
        for step in (0, 2, 3)
        for kind in ("self", "cross")
        for place, part in enumerate("qkv")
    }
    assert set(tensors) == set(wanted)
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert not torch.equal(tensors["step00.block01.self.q"], tensors["step02.block01.self.q"])


def test_attune_bench_reads_the_file_and_measures_it(host, wan, folder, tmp_path):
    sample(host.capture(wan, None, ((1, 1),), kind="self"))
    (file,) = files(folder)
    assert [one.shape.name for one in read_captured(file)] == [
        "captured step01.block00.self", "captured step01.block01.self",
    ]  # fmt: skip
    result = tmp_path / "out.csv"
    command = [sys.executable, str(ROOT), "bench", "--inputs", str(file), "--kernels", "sdpa_math", "--unproved"]
    done = subprocess.run(
        [*command, "--seconds", "0.05", "--csv", str(result)],
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "captured step01.block01.self, float32: batch 2, 2 heads of 128, 32 x 32 tokens" in done.stdout
    assert result.read_text("utf-8").count("sdpa_math") == 2


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_one_kind_only(host, wan, folder, kind):
    sample(host.capture(wan, kind=kind))
    assert names(files(folder)[0]) == [f"step00.block00.{kind}"]


def test_a_step_of_two_forwards_gives_the_first_one(host, wan, folder):
    """Conditionings of lengths that do not go together have a forward each."""
    model, seen = spied(host, wan)
    sample(host.capture(model, kind="cross", steps=()), steps=2, words=(6, 11))
    tensors = load_file(files(folder)[0])
    first, second = tensors["step00.block00.cross.k"], tensors["step01.block00.cross.k"]
    assert torch.equal(first, seen[0, 0, "cross"][1]) and torch.equal(second, seen[2, 0, "cross"][1])
    assert len(tensors) == 6


@pytest.mark.parametrize(
    ("name", "channels", "blocks", "wanted"),
    [
        ("flux1-dev.safetensors", 16, BlockRange(1, 2), ["step00.block01.self", "step00.block02.self"]),
        ("sd1.5.safetensors", 4, BlockRange(2, 2), ["step00.block02.cross", "step00.block02.self"]),
        ("sd3_medium.safetensors", 16, None, ["step00.other.self", "step00.other.self.2"]),
    ],
)
def test_the_blocks_of_other_models(host, models, folder, name, channels, blocks, wanted):
    model = load(models, name)
    sample(host.capture(model, blocks), steps=2, channels=channels, frames=False)
    assert names(files(folder)[0]) == wanted
    assert read_captured(files(folder)[0])


# Nodes of this pack beside it


@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_a_selector_beside_it_rules_as_ever(host, wan, folder, order):
    from comfyui_attune.host.runs import RUNS

    def select(model, kernel, source):
        return host.attach(model, Rule((kernel,), source=source))

    plain = select(wan, "basic", "1")
    plain = select(plain, "split", "2") if order == "both" else plain
    clean, record = sample(plain), RUNS.all()[-1].record.observed()
    model = select(wan, "basic", "1") if order != "after" else wan
    model = host.capture(model, None, ())
    model = {
        "before": lambda m: m,
        "after": lambda m: select(m, "basic", "1"),
        "both": lambda m: select(m, "split", "2"),
    }[order](model)
    assert torch.equal(sample(model), clean)
    run = RUNS.all()[-1]
    assert run.record.observed() == record and run.record.shadowed == 0
    assert [name for name in names(files(folder)[0]) if name.startswith("step03")] == [
        f"step03.block0{block}.{kind}" for block in (0, 1) for kind in ("cross", "self")
    ]
    assert any("AttentionCapture: Wrote 16 calls" in note and "capture_00001_" in note for note in run.record.notes)


def test_two_captures_on_one_model_have_a_file_each(host, wan, folder):
    sample(host.capture(host.capture(wan, kind="self"), BlockRange(1, 1)))
    assert sorted(map(names, files(folder))) == [
        ["step00.block00.self"], ["step00.block01.cross", "step00.block01.self"],
    ]  # fmt: skip


def test_the_model_that_came_in_keeps_nothing(host, wan, folder):
    options, wrappers = copy.deepcopy(wan.model_options), copy.deepcopy(wan.wrappers)
    sample(host.capture(wan))
    assert wan.model_options == options and wan.wrappers == wrappers
    sample(wan)
    assert len(files(folder)) == 1


def test_each_run_of_a_model_has_a_file_of_its_own(host, wan, folder):
    model = host.capture(wan)
    sample(model)
    sample(model)
    assert [file.name for file in files(folder)] == ["capture_00001_.safetensors", "capture_00002_.safetensors"]


# What does not go


def test_what_has_no_room_is_left_out_and_said(host, wan, folder, caplog):
    """A self call: 3 tensors of 2 x 2 x 32 x 128 float32, 192 KiB. A cross call: its k and v have 6 tokens."""
    with caplog.at_level("INFO"):
        sample(host.capture(wan, None, ((0, 0),), size=200 << 10))
    assert names(files(folder)[0]) == ["step00.block00.self"]
    assert "Left out: 3 calls for which max_mib (0) has no room left in this prompt" in said(caplog)[0]


def test_the_runs_of_one_prompt_share_the_room(host, wan, folder, monkeypatch):
    from comfyui_attune.host import capture

    about = dict.fromkeys(("prompt_id", "workflow_id", "client_id", "sampler_node"))
    monkeypatch.setattr(capture, "prompt_context", lambda: about)
    about["prompt_id"] = "one"
    model = host.capture(wan, None, ((0, 0),), "self", size=600 << 10)
    sample(model)
    sample(model)
    about["prompt_id"] = "two"
    sample(model)
    assert [len(names(file)) for file in files(folder)] == [2, 1, 2]


def test_an_interrupted_run_is_written(host, wan, folder, caplog):
    import comfy.model_management

    def stop(step, *_):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    with caplog.at_level("INFO"), pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(host.capture(wan, steps=()), callback=stop)
    assert names(files(folder)[0])[-1] == "step01.block00.self" and len(names(files(folder)[0])) == 4
    assert "Wrote 4 calls" in said(caplog)[0]


def test_nan_is_left_out_and_a_repeat_of_the_forward_fills_the_gap(host, wan, folder, monkeypatch, caplog):
    """The guard repeats a forward with the same noise level: what is kept then is that of the good one."""
    from comfyui_attune.host import captured_run

    spoilt = defaultdict(int)
    describe = captured_run.describe_host_call

    def first_is_nan(*args, **kwargs):
        call, (q, k, v) = describe(*args, **kwargs)
        spoilt[call.block, call.kind] += 1
        return call, (q * float("nan") if spoilt[call.block, call.kind] == 1 else q, k, v)

    monkeypatch.setattr(captured_run, "describe_host_call", first_is_nan)
    with caplog.at_level("INFO"):
        sample(host.capture(wan, kind="self", steps=((0, 1),)), steps=2, words=(6, 11))
    tensors = load_file(files(folder)[0])
    assert len(tensors) == 6 and all(tensor.isfinite().all() for tensor in tensors.values())
    assert "Left out: 1 call with NaN or infinity" in said(caplog)[0]


def test_grouped_heads_are_left_out_and_said(host, wan, folder, monkeypatch, caplog):
    from comfyui_attune.host import captured_run

    describe = captured_run.describe_host_call

    def grouped(q, k, v, heads, *args, **kwargs):
        half = k.shape[-1] // 2
        return describe(q, k[..., :half], v[..., :half], heads, *args, enable_gqa=True, **kwargs)

    monkeypatch.setattr(captured_run, "describe_host_call", grouped)
    with caplog.at_level("INFO"):
        sample(host.capture(wan))
    assert files(folder) == []
    assert "Nothing was captured" in said(caplog)[0] and "2 calls with fewer heads" in said(caplog)[0]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"steps": ((10, 12),)}, "this run had steps 0 to 3, none of them is wanted"),
        ({"blocks": BlockRange(7, 7)}, "no call of the wanted blocks and kind was made"),
    ],
)
def test_nothing_captured_says_why(host, wan, folder, caplog, arguments, wanted):
    with caplog.at_level("INFO"):
        sample(host.capture(wan, **arguments))
    assert files(folder) == [] and wanted in said(caplog)[0]


def test_a_model_without_attention_calls_says_so(host, wan, folder, caplog):
    import comfy.ldm.wan.model as module

    with caplog.at_level("INFO"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.WanModel, "forward", lambda self, x, *_args, **_kwargs: x)
        sample(host.capture(wan))
    assert files(folder) == [] and "no attention call of this model came through its options" in said(caplog)[0]


def test_blocks_that_the_model_does_not_tell_are_said(host, models, folder, caplog):
    with caplog.at_level("INFO"):
        sample(host.capture(load(models, "sd3_medium.safetensors")), steps=1, frames=False)
    assert files(folder) == [] and "leave 'blocks' empty" in said(caplog)[0]


@pytest.mark.parametrize("how", ["model", "forward"])
def test_under_torch_compile_nothing_is_seen_it_is_said_and_no_graph_is_made_anew(
    host, wan, folder, caplog, how, monkeypatch
):
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.wan.model as module
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    monkeypatch.setattr(module, "optimized_attention", attention.attention_pytorch)  # it breaks no graph
    graphs = []

    def backend(module, _inputs):
        graphs.append(module)
        return module.forward

    def compiled(model):
        torch._dynamo.reset()
        graphs.clear()
        if how == "model":
            set_torch_compile_wrapper(model, backend=backend)
        else:  # of one block, as other packs do it
            block = model.get_model_object("diffusion_model.blocks.0")
            model.add_object_patch("diffusion_model.blocks.0.forward", torch.compile(block.forward, backend=backend))
        return sample(model, steps=2), len(graphs)

    clean, wanted = compiled(wan.clone())
    with caplog.at_level("INFO", logger="attune"):
        out, found = compiled(host.capture(wan, steps=()))
    assert torch.equal(out, clean) and found == wanted > 0
    assert files(folder) == [] and "under torch.compile" in said(caplog)[0]


def test_a_disk_that_is_full_costs_the_file_and_nothing_else(host, wan, folder, monkeypatch, caplog):
    import safetensors.torch

    def full(_tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    clean = sample(wan)
    with caplog.at_level("INFO"):
        assert torch.equal(sample(host.capture(wan)), clean)
    assert files(folder) == [] and "could not be written" in said(caplog)[0] and "No space left" in said(caplog)[0]


def test_memory_that_runs_out_ends_the_capture_and_not_the_run(host, wan, folder, monkeypatch, caplog):
    from comfyui_attune.host import captured_run

    def out_of_memory(_tensors):
        raise torch.OutOfMemoryError("no more")

    clean = sample(wan)
    monkeypatch.setattr(captured_run, "_copied", out_of_memory)
    with caplog.at_level("INFO"):
        assert torch.equal(sample(host.capture(wan)), clean)
    assert files(folder) == [] and "it failed (OutOfMemoryError: no more)" in said(caplog)[0]


# Texts


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("", ()), ("  ", ()), ("0", ((0, 0),)), ("0, 10", ((0, 0), (10, 10))), ("4-7,9", ((4, 7), (9, 9)))],
)
def test_steps_are_read(host, text, wanted):
    from comfyui_attune.host.capture import parse_steps

    assert parse_steps(text) == wanted


@pytest.mark.parametrize("text", ["x", "1;2", "7-4", "-1", "1.5", ",", "1 2", "٣-", "9" * 30])
def test_nonsense_is_no_step(host, text):
    from comfyui_attune.host.capture import parse_steps

    with pytest.raises(ValueError, match=r"no step.*Wanted steps counted from 0"):
        parse_steps(text)


@pytest.mark.parametrize("prefix", ["", " ", "attune/", "../out", "/tmp/x", "a\0b"])
def test_a_prefix_that_leads_nowhere_is_refused(host, folder, prefix):
    from comfyui_attune.host.output_file import output_path

    with pytest.raises(ValueError, match=r"filename_prefix|nothing can be written"):
        output_path(prefix, ".csv")


def test_a_folder_that_cannot_be_made_is_refused(host, folder):
    from comfyui_attune.host.output_file import output_path

    folder.write_text("a file where the folder should be", "utf-8")
    with pytest.raises(ValueError, match="nothing can be written"):
        output_path("attune/capture", ".csv")
