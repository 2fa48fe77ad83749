"""`attune bench`: errors, rows, refusals, interrupts, and what is written."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_bench_parts import save_captured
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_attune import cli
from comfyui_attune.attention.call import Layout
from comfyui_attune.attention.kernel import Kernel, Needs
from comfyui_attune.attention.machine import CPU, Architecture, Device, Machine
from comfyui_attune.doctor import probe
from comfyui_attune.doctor.kernel_verdict import KernelVerdict
from comfyui_attune.kernels import KERNELS
from comfyui_attune.measure import bench as module
from comfyui_attune.measure import bench_command, bench_file, bench_plot, bench_table, shapes
from comfyui_attune.measure.bench import Bench, Case, run_bench
from comfyui_attune.measure.bench_errors import ROWS, kernel_errors, right_answers
from comfyui_attune.measure.bench_inputs import KINDS, Inputs
from comfyui_attune.measure.shapes import SETS, Shape
from comfyui_attune.measure.timing import Effort
from support.loading import ROOT

DEVICE = torch.device("cpu")
QUICK = Effort(warm=1, least=3, most=3, budget=0.1)
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
SMALL = Shape("small", 2, 3, 96, 40, 16)


def kernel(name: str, run, tolerance: float = 1e-3, **fields) -> Kernel:
    """A stand-in that takes everything in float32 on the CPU."""
    needs = Needs(devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32}), head_dims=range(1, 4097))
    given = {"layout": Layout.BHND, "precision": "exact", "load": lambda: run, "needs": needs, **fields}
    return Kernel(name=name, title=name, package="", tolerance={torch.float32: tolerance}, **given)


def right(q, k, v, *, mask=None, scale=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def bench(*kernels: Kernel, shape: Shape = SMALL, verdicts=None, **fields) -> dict:
    known = dict.fromkeys((one.name for one in kernels), "") if verdicts is None else verdicts
    given = {"effort": QUICK, **fields}
    return run_bench(Bench(kernels, Machine(), "cpu", [Case(shape, torch.float32)], known, **given))


# Errors.


def by_definition(inputs: Inputs, out: torch.Tensor) -> dict[str, float]:
    """The figures of one output in float64, written out."""
    q, k, v = (t.double() for t in inputs.bhnd())
    wanted = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    off = out.double() - wanted
    return {
        "cosine": float((out.double() * wanted).sum() / out.double().norm() / wanted.norm()),
        "l1": float(off.abs().sum() / wanted.abs().sum()),
        "l2": float(off.norm() / wanted.norm()),
        "largest": float(off.abs().max() / wanted.abs().max()),
    }


def rough(q, k, v, *, mask=None, scale=None):
    """Wrong by a known amount that depends on the place."""
    return right(q, k, v) * (1 + 0.01 * torch.arange(q.shape[2])[:, None] / q.shape[2])


def test_errors_are_those_of_float64_and_the_worst_kind_of_input_counts():
    (row,) = bench(kernel("rough", rough, tolerance=1))["rows"]
    inputs = Inputs(SMALL, torch.float32, DEVICE)
    found = []
    for kind in KINDS:
        inputs.fill(kind)
        found.append(by_definition(inputs, rough(*inputs.bhnd())))
    for name, pick in (("cosine", min), ("l1", max), ("l2", max), ("largest", max)):
        assert row[name] == pytest.approx(pick(one[name] for one in found), rel=1e-3), name
    assert row["compared_rows"] == SMALL.q_len


def test_sampled_queries_give_nearly_the_figures_of_all_and_the_row_says_so(monkeypatch):
    from comfyui_attune.measure import bench_errors

    shape = Shape("longer", 1, 4, 1000, 64, 16)
    inputs = Inputs(shape, torch.float32, DEVICE)
    of_all = kernel_errors(rough, kernel("rough", rough), inputs, right_answers(inputs, False, 0))
    monkeypatch.setattr(bench_errors, "_ALL", 100)
    truths = right_answers(inputs, False, 0)
    assert truths[0].wanted.shape == (1, 4, ROWS, 16)
    sampled = kernel_errors(rough, kernel("rough", rough), inputs, truths)
    assert sampled.l2 == pytest.approx(of_all.l2, rel=0.2)
    assert sampled != of_all
    (row,) = bench(kernel("rough", rough), shape=shape)["rows"]
    assert row["compared_rows"] == ROWS


def test_a_kernel_in_the_other_layout_is_compared_rightly():
    def other(q, k, v, *, mask=None, scale=None):
        return right(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    (row,) = bench(kernel("other", other, layout=Layout.BNHD))["rows"]
    assert row["verdict"] == "works" and row["l2"] < 1e-5


# Rows.


def test_a_row_has_all_its_figures_and_they_fit_together():
    result = bench(kernel("right", right))
    (row,) = result["rows"]
    assert list(row) == list(bench_file.FIELDS)
    assert row["status"] == "measured" and row["verdict"] == "works" and row["reason"] == ""
    assert row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["repeats"] == 3
    assert row["tflops"] == pytest.approx(SMALL.flops / (row["median_ms"] / 1000) / 1e12)
    assert row["peak_share"] == pytest.approx(row["tflops"] / result["peak_tflops"]["float32"])
    assert row["extra_bytes"] is None, "a CPU does not count what is allocated"
    assert row["clock_mhz"] is None and row["power_w"] is None


def test_clock_and_power_are_those_that_the_driver_told():
    (row,) = bench(kernel("right", right), sense=lambda: (1980.0, 612.5))["rows"]
    assert (row["clock_mhz"], row["power_w"]) == (1980.0, 612.5)


def raises(*_tensors, **_named):
    raise RuntimeError("no kernel image is available\nand a second line")


def test_a_kernel_that_fails_is_a_row_and_not_the_end():
    def load():
        raise ImportError("DLL load failed")

    def runs_out(*_tensors, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried …")

    result = bench(
        kernel("a", raises),
        kernel("b", right, load=load),
        kernel("c", runs_out),
        kernel("d", lambda q, k, v, **_: q[:, :, :1]),
        kernel("e", lambda q, k, v, **_: None),
        kernel("f", right),
    )
    rows = {row["kernel"]: row for row in result["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {**dict.fromkeys("abcde", "failed"), "f": "measured"}
    assert rows["a"]["reason"] == "RuntimeError: no kernel image is available"
    assert rows["b"]["reason"] == "ImportError: DLL load failed"
    assert rows["c"]["reason"] == "out of memory"
    assert "returned torch.float32 of (2, 3, 1, 16), wanted" in rows["d"]["reason"]
    assert "returned NoneType" in rows["e"]["reason"]


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda out: out * float("nan"), "wrong numbers: NaN or infinity"),
        (lambda out: out * 1.5, "wrong numbers: relative L2 0.5, allowed 0.001"),
    ],
)
def test_wrong_numbers_are_timed_and_told(spoil, verdict):
    result = bench(kernel("odd", lambda q, k, v, **_: spoil(right(q, k, v))))
    (row,) = result["rows"]
    assert row["status"] == "measured" and row["verdict"] == verdict
    assert f"odd: {verdict}" in bench_table.table(result)
    json.loads(bench_file.as_json(result))  # NaN is no JSON


def test_nan_on_one_kind_of_input_is_enough():
    def run(q, k, v, **_named):
        return right(q, k, v) * (float("nan") if float(v.mean(2).abs().mean()) > 2 else 1)

    (row,) = bench(kernel("odd", run))["rows"]
    assert row["verdict"] == "wrong numbers: NaN or infinity" and row["l2"] is None


def test_what_is_not_proved_is_never_called():
    called = []

    def run(*tensors, **_named):
        called.append(1)
        return right(*tensors)

    stands = [kernel(name, run) for name in ("bad", "unknown", "good")]
    rows = bench(*stands, verdicts={"bad": "crashed: segmentation fault", "good": ""})["rows"]
    assert [row["status"] for row in rows] == ["not proved", "not proved", "measured"]
    assert rows[0]["reason"] == "crashed: segmentation fault" and "no verdict" in rows[1]["reason"]
    before = len(called)
    bench(*stands[:2], verdicts={"bad": "crashed"})
    assert len(called) == before


def test_all_reasons_against_a_kernel_are_in_its_row():
    (row,) = bench(BY_NAME["flash2"])["rows"]
    assert row["status"] == "refused"
    assert "flash_attn is not installed" in row["reason"] and "needs bfloat16, float16" in row["reason"]


def test_a_kernel_that_needs_more_than_there_is_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda _device: 2**22)
    big = kernel("big", raises, workspace_bytes=lambda _call: 3 * 2**30)
    rows = bench(big, kernel("right", right))["rows"]
    assert rows[0]["status"] == "refused"
    assert re.fullmatch(r"needs 3.0 GiB beyond inputs and output, 3\.\d MiB are free", rows[0]["reason"])
    assert rows[1]["status"] == "measured"


def test_inputs_that_do_not_fit_are_not_made(monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda _device: 1000)
    monkeypatch.setattr(module, "Inputs", raises)
    (row,) = bench(kernel("right", right))["rows"]
    assert row["status"] == "refused" and row["reason"].startswith("the inputs take ")


def test_ctrl_c_keeps_what_was_measured():
    def stops(*_tensors, **_named):
        raise KeyboardInterrupt

    result = bench(kernel("one", right), kernel("two", stops), kernel("three", right))
    assert [row["kernel"] for row in result["rows"]] == ["one"]
    assert result["interrupted"] == "Ctrl+C"
    assert "Incomplete: Ctrl+C" in bench_table.table(result)


def test_a_lost_gpu_ends_it_and_says_which_kernel_lost_it(monkeypatch):
    """torch's own words for it, from a device that takes nothing more."""

    def gone(_device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(module._DeviceLostError, match="no kernel image"):
        module._attempt(torch.device("cuda:0"), raises)
    monkeypatch.setattr(
        module, "_attempt", lambda _device, work: (_ for _ in ()).throw(module._DeviceLostError("lost"))
    )
    result = bench(kernel("one", right), kernel("two", right))
    assert result["interrupted"] == "lost"


# The memory case.


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return out


LONG = Shape("long", 1, 2, 6144, 6144, 8)
SCORES = 2 * 6144 * 6144 * 4


def test_with_memory_nothing_allocates_the_scores_and_what_would_says_how_much():
    exact = [one for one in KERNELS if one.exact]
    with Largest() as seen:
        result = bench(*exact, shape=LONG, scores=False, one_error=True, effort=Effort(0, 1, 1, 0.0))
    rows = {row["kernel"]: row for row in result["rows"]}
    assert {name for name, row in rows.items() if row["status"] == "measured"} == {"sdpa", "sdpa_flash", "split"}
    assert re.match(
        r"needs \d.*iB beyond inputs and output, and would write out the scores", rows["sdpa_math"]["reason"]
    )
    assert seen.size < SCORES
    with Largest() as seen:
        bench(BY_NAME["sdpa_math"], shape=LONG, one_error=True, effort=Effort(0, 1, 1, 0.0))
    assert seen.size >= SCORES, "the measure of this test does not see the scores"


def test_the_case_of_112_5_gib_is_refused_by_what_would_allocate_it_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(module, "Inputs", raises)
    case = Case(shapes.MEMORY, torch.float16)
    math = BY_NAME["sdpa_math"]
    (row,) = run_bench(Bench([math], Machine(), "cpu", [case], {"sdpa_math": ""}, scores=False))["rows"]
    assert row["status"] == "refused"
    assert float(re.match(r"needs ([\d.]+) GiB", row["reason"])[1]) > 112.5


# What is written.


def test_json_and_csv_give_the_same_rows_back(tmp_path):
    result = bench(kernel("right", right), BY_NAME["flash2"], kernel("bad", raises))
    for name, text in (("r.json", bench_file.as_json(result)), ("r.csv", bench_file.as_csv(result))):
        bench_file.write(tmp_path / name, text)
        back = bench_file.read_result(tmp_path / name)
        assert back["rows"] == [{**row, "reason": row["reason"]} for row in result["rows"]]
        assert back["machine"]["torch"] == result["machine"]["torch"]
        assert back["machine"]["packages"] == result["machine"]["packages"]


def test_a_result_names_no_folder_and_no_user(tmp_path):
    from comfyui_attune.attention.machine import Fetched

    machine = Machine(fetched={"flash3": Fetched(str(tmp_path / "somebody"), "")})
    text = json.dumps(module.machine_data(machine, "cpu"))
    assert "flash3" in text and "somebody" not in text and str(tmp_path) not in text


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    target = tmp_path / "r.json"
    target.write_text("old", "utf-8")

    def full(*_names):
        raise OSError("No space left on device")

    monkeypatch.setattr(bench_file.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        bench_file.write(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"] and target.read_text("utf-8") == "old"


def long_result() -> dict:
    """A result as of a GPU, made up: every kernel on every shape of a set, in two types."""
    rows = []
    for number, name in enumerate(BY_NAME):
        for shape in SETS["wan2.2-14b"]():
            for dtype in ("float16", "bfloat16"):
                row = {**bench_file.empty_row(shape, dtype), "kernel": name}
                if number % 4 == 3:
                    row.update(status="refused", reason="package something is not installed; needs an sm_90")
                else:
                    row.update(
                        status="measured", verdict="works", median_ms=1234.5, low_ms=1200.0, high_ms=9999.0, repeats=9,
                        tflops=1234.5, peak_share=1.01, extra_bytes=1023 * 2**20, cosine=0.999999, l1=1e-3, l2=1.2e-3,
                        largest=1e-2, compared_rows=128,
                    )  # fmt: skip
                rows.append(row)
    machine = module.machine_data(
        Machine((Device("cuda:0", "NVIDIA H200", Architecture.HOPPER, (9, 0)), CPU)), "cuda:0"
    )
    return {"machine": machine, "peak_tflops": {"float16": 700.0, "bfloat16": 700.0}, "rows": rows, "interrupted": ""}


def test_the_table_has_at_most_100_columns_and_every_kernel():
    text = bench_table.table(long_result())
    assert max(map(len, text.splitlines())) <= 100
    for name in BY_NAME:
        assert name in text
    assert text.count("package something is not installed") == 1, "one reason is told once"


def test_a_restless_machine_is_told():
    result = long_result()
    assert "The spread is above 10% in" in bench_table.table(result)
    for row in result["rows"]:
        row["high_ms"] = row["median_ms"]
    assert "The spread is above" not in bench_table.table(
        {**result, "rows": [row for row in result["rows"] if row["status"] == "measured"]}
    )


def test_the_picture_is_drawn_for_many_rows_and_has_the_kernels_colours(tmp_path):
    from matplotlib.colors import to_rgb
    from PIL import Image

    from comfyui_attune.measure.palette import colour

    bench_plot.save_plot(long_result(), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 1000 and picture.height > 1000
        colours = {pixel for _, pixel in picture.convert("RGB").getcolors(2**24)}
    for name in ("sdpa", "xformers", "kitchen_int8"):
        assert tuple(round(255 * part) for part in to_rgb(colour(name))) in colours


def test_with_nothing_measured_there_is_a_table_and_no_picture(tmp_path):
    result = bench(BY_NAME["flash2"])
    assert "Nothing was measured." in bench_table.table(result)
    with pytest.raises(ValueError, match="nothing to draw"):
        bench_plot.save_plot(result, tmp_path / "x.png")


# The command.


@pytest.fixture
def proved(monkeypatch):
    """Verdicts without child processes: two kernels work, and one does not. Which were asked about is returned."""
    asked = []

    def examine(kernels, machine, pack, folder, device, **options):
        asked.append([kernel.name for kernel in kernels])
        works, bad = KernelVerdict("works"), KernelVerdict("crashed", "segmentation fault")
        return {kernel.name: bad if kernel.name == "sdpa_flash" else works for kernel in kernels}

    monkeypatch.setattr(probe, "examine", examine)
    return asked


TINY = ("bench", "--shape", "1,2,64,64,16", "--seconds", "0.05", "--dtypes", "fp32")


def test_the_command_writes_all_it_is_asked_for(proved, tmp_path, capsys):
    files = [tmp_path / f"ein Ergebnis é.{end}" for end in ("json", "csv", "png")]
    options = [
        part for name, path in zip(("--json", "--csv", "--plot"), files, strict=True) for part in (name, str(path))
    ]
    assert cli.main([*TINY, "--kernels", "sdpa,sdpa_flash,split", *options]) == 0
    assert proved == [["sdpa", "sdpa_flash", "split"]]
    text = capsys.readouterr().out
    assert "1,2,64,64,16, float32: 2 heads of 16, 64 x 64 tokens" in text
    assert "not proved: crashed: segmentation fault: sdpa_flash" in text
    data = json.loads(files[0].read_text("utf-8"))
    assert (data["kind"], data["schema"], data["options"]["shape"]) == ("attune bench", 1, ["1,2,64,64,16"])
    assert [row["status"] for row in data["rows"]] == ["measured", "not proved", "measured"]
    lines = list(csv.DictReader(io.StringIO(files[1].read_text("utf-8"))))
    assert [line["kernel"] for line in lines] == ["sdpa", "sdpa_flash", "split"]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_files_are_written_although_nobody_reads_the_text(proved, tmp_path, monkeypatch):
    def closed(_result):
        raise OSError("the terminal is gone")

    monkeypatch.setattr(bench_table, "table", closed)
    with pytest.raises(OSError, match="gone"):
        cli.main([*TINY, "--kernels", "sdpa", "--csv", str(tmp_path / "x.csv")])
    assert len(bench_file.read_result(tmp_path / "x.csv")["rows"]) == 1


def test_unproved_asks_nobody(proved, capsys):
    assert cli.main([*TINY, "--kernels", "sdpa_flash", "--unproved"]) == 0
    assert proved == [] and "sdpa_flash" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kernels", "nonsense"), "unknown kernel nonsense; known are: sdpa"),
        (("--shapes", "nonsense"), "unknown set of shapes 'nonsense'; known are: wan2.2-14b"),
        (("--shape", "1,2,3"), "wanted B,H,N,M,D"),
        (("--dtypes", "int3"), "unknown data type int3"),
        (("--seconds", "-1"), "--seconds -1.0: wanted a number above 0"),
        (("--device", "cuda:99"), "unknown device 'cuda:99'"),
        (("--json", "no such folder/x.json"), "there is no folder"),
        (("--plot", "x.txt"), "wanted a name that ends in .png"),
        (("--inputs", "not there.safetensors"), "not there.safetensors"),
    ],
)
def test_a_wrong_option_is_told_before_anything_runs(proved, options, said, capsys):
    assert cli.main(["bench", *options]) == 2
    assert said in capsys.readouterr().err
    assert proved == []


def test_an_interrupted_command_writes_its_files(proved, tmp_path, monkeypatch, capsys):
    def stops(*_tensors, **_named):
        raise KeyboardInterrupt

    both = (kernel("sdpa", right), kernel("split", stops))
    monkeypatch.setattr(cli, "_all_kernels", lambda: both)
    assert cli.main([*TINY, "--json", str(tmp_path / "x.json"), "--csv", str(tmp_path / "x.csv")]) == 130
    assert "Incomplete: Ctrl+C" in capsys.readouterr().out
    data = json.loads((tmp_path / "x.json").read_text("utf-8"))
    assert data["interrupted"] == "Ctrl+C" and [row["kernel"] for row in data["rows"]] == ["sdpa"]
    assert bench_file.read_result(tmp_path / "x.csv")["rows"][0]["kernel"] == "sdpa"


def test_without_matplotlib_the_rest_is_written_and_it_says_what_to_install(proved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot, table = tmp_path / "x.png", tmp_path / "x.csv"
    assert cli.main([*TINY, "--kernels", "sdpa", "--plot", str(plot), "--csv", str(table)]) == 1
    said = capsys.readouterr()
    assert "pip install matplotlib" in said.err and "TFLOP/s" in said.out
    assert table.exists() and not plot.exists()


def test_captured_inputs_are_measured_in_their_own_type(proved, tmp_path, capsys):
    parts = {part: torch.randn(1, 2, 8, 16).bfloat16() for part in "qkv"}
    path = save_captured(tmp_path / "calls.safetensors", **{f"b0.{part}": t for part, t in parts.items()})
    out = tmp_path / "x.json"
    options = ("--kernels", "sdpa", "--seconds", "0.05", "--json", str(out))
    assert cli.main(["bench", "--inputs", str(path), *options]) == 0
    (row,) = json.loads(out.read_text("utf-8"))["rows"]
    assert (row["shape"], row["dtype"], row["status"]) == ("captured b0", "bfloat16", "measured")
    assert str(tmp_path) not in out.read_text("utf-8")


def test_the_real_command_proves_kernels_first_and_measures_here(tmp_path):
    """Nothing replaced: the doctor's children, then the kernels, in a process of its own."""
    out = tmp_path / "x.json"
    command = [
        sys.executable,
        str(ROOT),
        *TINY,
        "--kernels",
        "split,flash2",
        "--home",
        str(tmp_path),
        "--json",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "tried in a child process: split: works" in done.stderr
    rows = {row["kernel"]: row for row in json.loads(out.read_text("utf-8"))["rows"]}
    assert rows["split"]["status"] == "measured" and rows["split"]["l2"] < 2e-5
    assert rows["flash2"]["status"] == "refused"


def test_bench_command_gives_the_memory_case_its_limits(proved, monkeypatch, capsys):
    seen = []

    def run(given):
        seen.append(given)
        return run_bench(replace(given, cases=[Case(SMALL, torch.float32)]))

    monkeypatch.setattr(module, "run_bench", run)
    assert cli.main(["bench", "--memory"]) == 0
    (given,) = seen
    assert not given.scores and all(kernel.exact for kernel in given.kernels)
    assert [case.shape for case in given.cases] == [shapes.MEMORY] and given.cases[0].dtype is torch.float16
    assert (
        bench_command.memory_text([{**bench_file.empty_row(shapes.MEMORY, "float16"), "kernel": "x"}]).strip()
        == "controlvideo 15 frames: the scores would take 112.5 GiB; what would write them out was refused beforehand."
    )
