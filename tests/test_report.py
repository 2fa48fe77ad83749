"""Reports of runs: as text, as a picture, and what the command prints."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from typing import NamedTuple

import numpy
import pytest
import torch
from PIL import Image

from comfyui_attune.attention.clock import Clock, Timing
from comfyui_attune.attention.machine import CPU, Device, Machine, nvidia_architecture
from comfyui_attune.attention.plan import Decision
from comfyui_attune.attention.policy import KERNEL_NAMES, Policy, Rule
from comfyui_attune.attention.record import Record
from comfyui_attune.cli import main
from comfyui_attune.host import run_files
from comfyui_attune.host.runs import RunInfo
from comfyui_attune.measure import palette
from comfyui_attune.measure.heat_map import grid, pixels
from comfyui_attune.measure.run_cells import phases
from comfyui_attune.measure.run_picture import draw, picture, scrub
from comfyui_attune.measure.run_text import runs_text
from comfyui_attune.measure.sheet import Box, Letters, Pixels
from support.loading import ROOT

GPU = Device("cuda:0", "NVIDIA GeForce RTX 5090 «Größe» 显卡", nvidia_architecture((12, 0)), (12, 0), 32 << 30)
HERE = Machine((GPU, CPU), torch="2.11.0+cu130", host_attention="pytorch")
WITHOUT = importlib.util.find_spec("matplotlib") is None
needs_matplotlib = pytest.mark.skipif(WITHOUT, reason="matplotlib, an optional extra, is not installed")


def run_of(blocks, steps, pick, kinds=("self",), first_step=0, whole=0, doubles=0, **about) -> RunInfo:
    """A run of a model with `blocks` blocks (None: it does not tell) in which `pick(step, block, kind)` ran."""
    record = Record(Policy((Rule(("sage3",), source="7"),)))
    record.sigmas = [1 - step / steps for step in range(steps + 1)]
    record.first_step, record.blocks, record.doubles, record.longest_self = first_step, blocks, doubles, 32760
    for step in range(steps):
        calls = {}
        for block in range(blocks) if blocks else [None]:
            for kind in kinds:
                calls[(Decision(pick(step, block, kind), "sage3", "7"),), block, kind] = 1
        record.add(calls, forwards=1, sigma=torch.tensor(record.sigmas[step]))
    known = {"number": 1, "prompt_id": "p", "workflow_id": None, "client_id": None, "sampler_node": "3"}
    run = RunInfo(**{**known, "model": "WAN21", "record": record, "node_types": {}, "steps": whole or steps, **about})
    run.status = "finished"
    return run


def data_of(run: RunInfo) -> dict:
    run.record.devices = {"cuda:0": None}  # as if it had been there
    run.close()
    return run.as_data(HERE)


def healed() -> RunInfo:
    """A run of 4 blocks and 5 steps in which sage3 broke in block 3 at step 2."""
    run = run_of(4, 5, lambda step, block, kind: "sage3" if step < 2 else "sdpa" if block == 3 else "sage3")
    record = Record(run.record.policy)
    record.sigmas, record.blocks, record.longest_self = run.record.sigmas, 4, 32760
    sage, host = ((Decision(name, "sage3", "7"),) for name in ("sage3", "host"))
    after = (Decision("sage3", "sage3", "7", ("gave NaN or infinity",)), Decision("sdpa", "sdpa", "6"))
    for step, sigma in enumerate(record.sigmas[:-1]):
        trails = [after if step > 2 and block == 3 else sage for block in range(4)]
        calls = {(trail, block, "self"): 1 for block, trail in enumerate(trails)}
        if step == 2:
            record.add(calls, sigma=torch.tensor(sigma), discarded=True)
            record.event("repeat", "a forward was repeated on the host's own attention", reason="sage3 gave NaN")
            record.event(
                "demotion", "sage3 gave NaN or infinity", kernel="sage3", block=3, reason="gave NaN or infinity"
            )
            calls = {(host, block, "self"): 1 for block in range(4)}
        record.add(calls, forwards=1, sigma=torch.tensor(sigma))
    record.sampled("sage3", 0.04, 0.05, 0)
    run.record = record
    return run


def timed() -> RunInfo:
    """A run with long names, large counts, shares of every size and small errors."""
    names = ["sage3_per_block_mean", "sage2_fp16_triton", "xformers_cutlass", "host"]
    run = run_of(40, 30, lambda step, block, kind: names[block % 4])
    run.record.clock = Clock()
    run.close()
    for name, seconds in zip(names, (99.0, 1.0, 0.001, 0.0), strict=True):
        run.record.times[name] = Timing(300, seconds)
        run.record.add({((Decision(name, name, "7"),), 0, "self"): 1_234_567})
        run.record.sampled(name, 0.000212, 0.000212, 0)
        run.record.sampled(name, 0.000412, 0.000412, 0)
    return run


# Text


def test_the_text_tells_where_what_ran_and_what_went_wrong():
    text = runs_text([data_of(healed())])
    assert "WAN21, 5 steps: finished, sampler node 3" in text
    assert "Planned: sage3 ×20" in text and "Ran: sage3 ×14, host ×4, sdpa ×2" in text
    assert "steps 0-1: sage3 for self attention in blocks 0-3" in text
    assert "step 2: host for self attention in blocks 0-3" in text
    assert "steps 3-4: sage3 for self attention in blocks 0-2; sdpa for self attention in block 3" in text
    assert "1 forward(s) were thrown away and done again" in text
    assert re.search(r"given up ×1: sage3 gave NaN or infinity \(first in step 2, block 3\)", text)
    assert re.search(r"sage3 +14 +4 +0\.04 / 0\.04", text)
    assert "Time was not measured: switch on time_calls on the Attention Selector" in text
    assert "32,760 tokens" in text and "RTX 5090" in text and "torch 2.11.0+cu130" in text


def test_a_kernel_that_is_given_up_in_many_blocks_is_one_line():
    run = healed()
    for block in (0, 1, 2):
        reason = "gave NaN or infinity"
        text = f"sage3 {reason} in block {block}"
        run.record.event("demotion", text, kernel="sage3", block=block, call_kind="self", reason=reason)
        run.record.note(f"{text}; another kernel computes such calls")
    lines = [line for line in runs_text([data_of(run)]).splitlines() if "given up" in line]
    assert lines == ["  given up ×4: sage3 gave NaN or infinity (first in step 2, blocks 0-3, self attention)"]
    assert "Notes" not in runs_text([data_of(run)]), "it is not said twice"


def test_what_measuring_took_is_told_where_there_was_some():
    run = run_of(2, 2, lambda *_: "split")
    assert "Measuring" not in runs_text([data_of(run)])
    run.record.measuring = 0.0421
    assert "Measuring kernels for auto took 0.042 s of the run." in runs_text([data_of(run)])


def test_stages_are_numbered_and_named_by_their_steps():
    stages = [
        data_of(run_of(2, 2, lambda *_: "split", first_step=0, whole=4, sampler_node="12")),
        data_of(run_of(2, 2, lambda *_: "host", first_step=2, whole=4, sampler_node="13")),
    ]
    text = runs_text(stages)
    assert "1. WAN21, steps 0-1 of 4: finished, sampler node 12" in text
    assert "2. WAN21, steps 2-3 of 4: finished, sampler node 13" in text
    assert "steps 2-3: host" in text


def test_steps_that_are_alike_are_told_once_and_kinds_that_are_alike_too():
    run = run_of(
        3, 4, lambda step, block, kind: "sdpa" if step == 3 and kind == "cross" else "split", ("self", "cross")
    )
    early, late = phases(data_of(run))
    assert early.steps == [0, 1, 2] and early.rows == [("split", "", [0, 1, 2])]
    assert late.rows == [("sdpa", "cross", [0, 1, 2]), ("split", "self", [0, 1, 2])]


# Picture


def test_every_kernel_has_a_colour_of_its_own():
    names = set(KERNEL_NAMES) - {"auto", "auto_fast", "flash", "sage"}
    colours = {name: palette.colour(name) for name in names}
    assert len(set(colours.values())) == len(names), "no two kernels look alike"
    assert palette.colour("mine_from_a_plugin") == palette.colour("mine_from_a_plugin") != palette.NOTHING


def test_the_heat_map_has_the_kernels_colour_at_each_block_and_step():
    run = run_of(3, 4, lambda step, block, kind: "sage3" if (step, block) == (2, 1) else "split")
    panel = grid(data_of(run))
    image = pixels(panel, 10, 10)
    assert image.shape == (30, 40, 3)
    for block in range(3):
        for step in range(4):
            name = "sage3" if (step, block) == (2, 1) else "split"
            assert tuple(image[block * 10 + 4, step * 10 + 4]) == palette.rgb(palette.colour(name)), (block, step)


def test_where_cross_attention_ran_elsewhere_it_is_the_lower_edge_of_the_cell():
    run = run_of(1, 1, lambda step, block, kind: "sage3" if kind == "self" else "sdpa", ("self", "cross"))
    image = pixels(grid(data_of(run)), 20, 20)
    assert tuple(image[2, 5]) == palette.rgb(palette.colour("sage3"))
    assert tuple(image[17, 5]) == palette.rgb(palette.colour("sdpa"))


def test_a_block_without_calls_and_a_model_without_blocks():
    some = grid(data_of(run_of(4, 2, lambda *_: "split")) | {"blocks": 6})
    assert some.blocks == [0, 1, 2, 3, 4, 5]
    assert tuple(pixels(some, 10, 10)[55, 5]) == palette.rgb(palette.NOTHING)
    assert grid(data_of(run_of(None, 2, lambda *_: "split"))).blocks == [None]


CASES = {
    "2 blocks, 2 steps": lambda: [run_of(2, 2, lambda *_: "split")],
    "40 blocks, 50 steps": lambda: [run_of(40, 50, lambda step, *_: "sage3" if step > 9 else "flash2")],
    "two stages": lambda: [run_of(40, 10, lambda *_: "sage3"), run_of(40, 10, lambda *_: "sdpa", first_step=10)],
    "flux": lambda: [run_of(57, 28, lambda step, block, kind: "sage2_fp8_cuda_pp" if block else "sdpa", doubles=19)],
    "no blocks": lambda: [run_of(None, 30, lambda *_: "xformers")],
    "one forward": lambda: [run_of(1, 1, lambda *_: "host")],
    "1000 steps": lambda: [run_of(120, 1000, lambda *_: "sdpa_efficient")],
    "eight runs": lambda: [
        run_of(20, 9, lambda step, *_: KERNEL_NAMES[step + 11], sampler_node="1234") for _ in range(8)
    ],
    "healed": lambda: [healed()],
    "timed": lambda: [timed()],
    "stopped before a step": lambda: [
        RunInfo(1, "p", None, None, "3", "WAN21", Record(Policy()), {}, status="stopped")
    ],
    "none": lambda: [],
}


@needs_matplotlib
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_cut_off_or_written_over_something_else(case):
    runs = [data_of(run) for run in CASES[case]()]
    sheet, height = draw(runs, ["Nothing was sampled. " * 8])
    image = sheet.paint(height)
    assert image.shape == (height, 1600, 3) and image.dtype == numpy.uint8 and height < 2500
    placed = []
    for item in sheet.items:
        if isinstance(item, Letters) and item.text:
            wide = sheet.measure(item.text, item.style)
            left = item.x - {"left": 0.0, "center": wide / 2, "right": wide}[item.align]
            placed.append((left, item.y - item.style.size * 0.8, left + wide, item.y, item.text))
        elif isinstance(item, Pixels):
            rows, columns, _ = item.data.shape
            placed.append((item.x, item.y, item.x + columns, item.y + rows, "the heat map"))
        elif isinstance(item, Box) and item.width == item.height:
            placed.append((item.x, item.y, item.x + item.width, item.y + item.height, "a kernel's colour"))
    for number, one in enumerate(placed):
        assert one[0] >= 20 and one[1] >= 8 and one[2] <= 1580 and one[3] <= height - 12, one
        for other in placed[number + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (case, one, other)


@needs_matplotlib
def test_what_happened_stands_beside_the_map_and_is_marked_in_it():
    sheet, height = draw([data_of(healed())])
    written = " ".join(item.text for item in sheet.items if isinstance(item, Letters))
    assert "WAN21 on NVIDIA GeForce RTX 5090" in written and "32,760 tokens" in written
    assert "sage3 ×14, host ×4, sdpa ×2" in written and "0.04 / 0.04" in written
    assert "given up ×1: sage3 gave NaN or infinity" in written
    marks = {item.sign: item for item in sheet.items if type(item).__name__ == "Mark"}
    (heat,) = (item for item in sheet.items if isinstance(item, Pixels))
    wide, high = heat.data.shape[1] / 5, heat.data.shape[0] / 4
    assert marks["v"].x == pytest.approx(heat.x + 2.5 * wide) and marks["v"].y < heat.y
    assert marks["x"].x == pytest.approx(heat.x + 2.5 * wide)
    assert marks["x"].y == pytest.approx(heat.y + 3.5 * high)
    image = sheet.paint(height)
    centre = image[round(marks["x"].y), round(marks["x"].x)]
    assert centre.max() < 90, "the cross is there"


def test_no_name_of_a_user_gets_into_the_picture():
    for text in (
        "raised OSError: /home/alice/ComfyUI/custom_nodes/x.so: undefined symbol",
        r"raised OSError: C:\Users\alice\AppData\x.dll was not found",
        "in ~/alice/venv/lib/x.py",
    ):
        assert "alice" not in scrub(text) and ("x.so" in scrub(text) or "x.dll" in scrub(text) or "x.py" in scrub(text))
    assert scrub("0.04 / 0.06, self and/or cross") == "0.04 / 0.06, self and/or cross"


@pytest.mark.parametrize("broken", ["matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"])
def test_without_matplotlib_a_plain_picture_says_what_to_install(monkeypatch, broken):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, broken, None)
    said = []
    from PIL import ImageDraw

    real = ImageDraw.ImageDraw.multiline_text
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", lambda *a, **k: (said.append(a[2]), real(*a, **k))[1])
    image = picture([data_of(healed())], ["a remark"])
    assert image.ndim == 3 and image.dtype == numpy.uint8 and (image < 100).any()
    assert "pip install matplotlib" in said[0] and "sage3 ×14" in said[0] and "a remark" in said[0]


UNTOUCHED = """
import test_report as t
import matplotlib
run = t.data_of(t.healed())
before = matplotlib.rcParams.copy()
plain = t.picture([run])
set = {"font.family": "serif", "text.color": "red", "figure.facecolor": "black", "savefig.dpi": 30, "font.size": 40}
set |= {"image.origin": "lower", "lines.color": "red", "axes.facecolor": "black", "figure.dpi": 200}
matplotlib.rcParams.update(set)
assert t.numpy.array_equal(t.picture([run]), plain), "what another pack set reaches the picture"
now = matplotlib.rcParams.copy()
assert all(dict.__getitem__(now, name) == dict.__getitem__(before, name) for name in before.keys() - set.keys())
assert "matplotlib.pyplot" not in t.sys.modules
"""


@needs_matplotlib
def test_matplotlib_is_used_without_touching_what_is_global():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from support import loading\n"
    code += "loading.load_package('comfyui_attune', loading.ROOT)\n"
    code += "loading.load_package('attune_devtools', loading.ROOT / 'devtools')\n"
    done = subprocess.run(
        [sys.executable, "-c", code + UNTOUCHED], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr


# The command


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def attune(capsys, monkeypatch):
    """attune(home, *arguments): the command `attune report` with the pack's state in the folder `home`."""

    def run(home, *arguments) -> Done:
        monkeypatch.setenv("ATTUNE_HOME", str(home))
        capsys.readouterr()
        status = main(["report", *map(str, arguments)])
        return Done(status, *capsys.readouterr())

    return run


def test_the_command_without_runs_says_so(tmp_path, attune):
    done = attune(tmp_path)
    assert done.returncode == 1 and "no record of a run" in done.stdout and str(tmp_path) in done.stdout


def test_the_command_tells_the_last_prompt_in_full_and_a_file_by_itself(tmp_path, attune):
    for number, (prompt, sampler) in enumerate([("old", "1"), ("new", "12"), ("new", "13")]):
        run = run_of(2, 2, lambda *_: "split", prompt_id=prompt, sampler_node=sampler, started=1.7e9 + number)
        run.close()
        run_files.save(run, HERE, tmp_path / "Größe" / "runs")
    (tmp_path / "Größe" / "runs" / "99999999-foreign.json").write_text("[]", "utf-8")
    done = attune(tmp_path / "Größe")
    assert done.returncode == 0 and "sampler node 12" in done.stdout and "sampler node 13" in done.stdout
    assert "sampler node 1\n" not in done.stdout
    assert attune(tmp_path, "--last", "--home", tmp_path / "Größe").stdout == done.stdout
    listed = json.loads(attune(tmp_path / "Größe", "--last", "--json").stdout)
    assert [run["sampler_node"] for run in listed] == ["12", "13"]
    one = attune(tmp_path, run.file, "--picture", tmp_path / "one.png")
    assert one.returncode == 0 and "sampler node 13" in one.stdout and "sampler node 12" not in one.stdout
    with Image.open(tmp_path / "one.png") as image:
        assert image.size[0] >= 1200


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no JSON"),
        (b"\xff\xfe\x00", "holds no JSON"),
        (b"[" * 100_000, "holds no JSON"),
        (b"[1]", "wanted kind 'attune run', found 'list'"),
        (b'{"kind": "attune cache", "schema": 1}', "found 'attune cache'"),
        (b'{"kind": "attune run", "schema": 99}', "wanted schema 1, found 99"),
        (b'{"kind": "attune run", "schema": 1}', "no whole record"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_record_of_a_run_is_a_clear_error(tmp_path, attune, content, says):
    file = tmp_path / "what.json"
    if content is not None:
        file.write_bytes(content)
    done = attune(tmp_path, str(file))
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_damaged_record_is_a_clear_error(tmp_path, attune):
    run = run_of(2, 2, lambda *_: "split")
    run.close()
    run_files.save(run, HERE, tmp_path)
    data = json.loads(run.file.read_text("utf-8"))
    for key, wrong in (("steps", 5), ("kernels", []), ("patterns", []), ("machine", None), ("stage", {})):
        (tmp_path / "damaged.json").write_text(json.dumps({**data, key: wrong}), "utf-8")
        done = attune(tmp_path, str(tmp_path / "damaged.json"))
        assert done.returncode == 2 and "is damaged" in done.stderr and "Traceback" not in done.stderr, (
            key,
            done.stderr,
        )
