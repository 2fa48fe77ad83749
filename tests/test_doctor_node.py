"""The node AttentionDoctor in a real ComfyUI, and the picture that it makes."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

from comfyui_attune.attention.kernel import machine_reasons
from comfyui_attune.attention.listing import kernel_rows
from comfyui_attune.attention.machine import CPU, Device, Machine, nvidia_architecture, read_machine
from comfyui_attune.doctor import paint
from comfyui_attune.doctor.kernel_verdict import OUTCOMES, KernelVerdict
from comfyui_attune.doctor.look import report
from comfyui_attune.doctor.picture import COLOURS, PAPER, Box, Drawing, Letters, draw
from comfyui_attune.doctor.probe import without_trying
from comfyui_attune.doctor.report import Report
from comfyui_attune.kernels import KERNELS
from support.loading import ROOT
from support.prompts import node

ALONE = {"1": node("AttentionDoctor")}


def outcomes(text: str) -> dict[str, str]:
    """Kernel → outcome, as the table in the text has them."""
    return dict(re.findall(rf"^(\w+) +(?:exact|lossy) +({'|'.join(OUTCOMES)})(?: {{2}}|$)", text, re.MULTILINE))


# In ComfyUI


def test_its_face_in_the_node_library(server):
    info = server.object_info()["AttentionDoctor"]
    assert info["category"] == "attention" and info["output_node"] and len(info["description"]) > 40
    assert (info["output"], info["output_name"]) == (["STRING", "IMAGE"], ["text", "picture"])
    assert not info["input"].get("required") and not info["input"].get("optional")


def test_the_report_is_right_and_its_picture_can_be_saved(server):
    prompt = {
        **ALONE,
        "2": node("SaveImage", images=["1", 1], filename_prefix="tests/doctor"),
        "3": node("PreviewAny", source=["1", 0]),
    }
    result = server.run(prompt)
    (text,) = result.outputs["1"]["text"]
    assert result.outputs["3"]["text"] == [text]
    here, found = read_machine(gpus=False), outcomes(text)
    for kernel in KERNELS:
        reasons = machine_reasons(kernel, here)
        assert (found[kernel.name] in ("not installed", "unsupported")) is bool(reasons), kernel.name
    assert found["sdpa"] == found["split"] == "works"
    assert re.search(r"^sub_quad +exact +available", text, re.MULTILINE), "inside ComfyUI it is there"
    assert "ComfyUI's own attention: sub_quad" in text
    assert "ComfyUI was started with --cpu" in text
    (saved,) = result.files
    (shown,) = result.outputs["1"]["images"]
    on_face = result.base / "temp" / shown["subfolder"] / shown["filename"]
    with Image.open(saved) as picture, Image.open(on_face) as face:
        assert picture.size == face.size and picture.size[0] == 1760
        pixels = numpy.array(picture.convert("RGB"))
        assert numpy.array_equal(pixels, numpy.array(face.convert("RGB")))
    assert has_colour(pixels, PAPER) and has_colour(pixels, COLOURS["works"])


def test_it_works_alone_on_a_graph_and_looks_anew_at_each_prompt(server):
    first, second = server.run(ALONE), server.run(ALONE)
    assert first.outputs["1"]["text"] and second.outputs["1"]["text"]
    assert "1" not in second.cached


def test_attune_off_is_said_and_does_not_stop_it(make_server, server):
    server.run(ALONE)
    off = make_server(env={"ATTUNE": "off", "ATTUNE_HOME": str(server.base / "user" / "attune")})
    try:
        (text,) = off.run(ALONE).outputs["1"]["text"]
    finally:
        off.stop()
    assert "ATTUNE=off" in text and outcomes(text)["sdpa"] == "works"


# The picture

GPU = Device("cuda:0", "NVIDIA GeForce RTX 5090 «Größe»", nvidia_architecture((12, 0)), (12, 0), 32 << 30, 29 << 30)
PACKAGES = {"xformers": "0.0.35", "flash_attn": "2.8.3", "sageattention": "2.2.0+cu130", "sageattn3": "1.0.0"}
HERE = Machine(
    (GPU, CPU), torch="2.10.0+cu130", cuda="13.0", triton="3.6.0", python="3.12.7", packages=PACKAGES, driver="580.65"
)
LONG = "stripes are wet at /home/alice/" + "x" * 300
FOUND = {
    "flash2": KernelVerdict("cannot import", "ImportError: x.so: undefined symbol: _ZN3c105ErrorC2ENS", "Traceback …"),
    "sage2_fp16_cuda": KernelVerdict("unsupported", f"ZebraError: {LONG}", LONG),
    "sage2_fp8_cuda": KernelVerdict("wrong numbers", "relative error 0.5 where 0.04 is allowed", error=0.5),
    "xformers": KernelVerdict("crashed", "ended that process with signal 11 (SIGSEGV), in $\\frac{1}{2}$ of 2 calls"),
    "xformers_cutlass": KernelVerdict("hung", "did not come to an end within 100 seconds"),
    "sage3": KernelVerdict("undecided", "no child process could be started (\x1b[31mred\x1b[0m\n)"),
}  # fmt: skip
WORKS = KernelVerdict("works", error=1e-3, allowed=2e-3, milliseconds=0.5, timed="4096 tokens, 8 heads of 64", calls=20)


def found(here: Machine, tmp_path: Path, verdicts: dict[str, KernelVerdict]) -> Report:
    """A report in which everything works that this machine does not rule out, but for `verdicts`."""
    all_of_them = {
        kernel.name: verdicts.get(kernel.name) or without_trying(kernel, here, here.main_device) or WORKS
        for kernel in KERNELS
    }
    names = {kernel.name: kernel for kernel in KERNELS}
    elsewhere = [row for row in kernel_rows(names, here) if row["name"] not in names]
    return report(KERNELS, all_of_them, here, ROOT, tmp_path, elsewhere=elsewhere)


def has_colour(pixels: numpy.ndarray, colour: str) -> bool:
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return bool((pixels == numpy.array(wanted, dtype=numpy.uint8)).all(axis=2).any())


WITHOUT = importlib.util.find_spec("matplotlib") is None
NOT_INSTALLED = "matplotlib, an optional extra, is not installed"
BRUSHES = [pytest.param(paint.Matplotlib, marks=pytest.mark.skipif(WITHOUT, reason=NOT_INSTALLED)), paint.Pillow]


@pytest.fixture(params=BRUSHES)
def brush(request):
    return request.param()


def lines_by_column(drawing: Drawing) -> list[Letters]:
    return [item for item in drawing.items if isinstance(item, Letters) and item.text]


def test_every_outcome_has_its_badge(brush, tmp_path):
    everything = found(HERE, tmp_path, FOUND)
    assert {one.verdict.outcome for one in everything.diagnoses} == set(OUTCOMES) == set(COLOURS)
    drawing = draw(everything, brush.measure)
    pixels = brush.paint(drawing)
    assert pixels.shape == (drawing.height, drawing.width, 3) and pixels.dtype == numpy.uint8
    assert all(has_colour(pixels, colour) for colour in COLOURS.values())
    written = [item.text for item in lines_by_column(drawing)]
    assert {kernel.name for kernel in KERNELS} <= set(written)
    assert written[0] == GPU.title
    assert any("driver 580.65" in line for line in written) and any("29.0 free" in line for line in written)


@pytest.mark.parametrize("here", [HERE, Machine(torch="2.11.0+cpu")], ids=["gpu", "cpu"])
def test_no_text_is_cut_off_or_written_over_another(brush, tmp_path, here):
    drawing = draw(found(here, tmp_path, FOUND if here is HERE else {}), brush.measure)
    placed = [
        (item.x, item.y, item.x + brush.measure(item.text, item.style), item.y + item.style.size, item.text)
        for item in lines_by_column(drawing)
    ]
    for left, top, right, bottom, text in placed:
        assert left >= 0 and right <= drawing.width - 20 and top >= 0 and bottom <= drawing.height - 20, text
    for one, other in itertools.combinations(placed, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one[4], other[4])


def test_a_badge_holds_its_word(brush, tmp_path):
    items = draw(found(HERE, tmp_path, FOUND), brush.measure).items
    badges = [(box, word) for box, word in itertools.pairwise(items) if isinstance(box, Box) and box.radius == 7]
    assert len(badges) == len(KERNELS) + 2  # the two of ComfyUI
    for box, word in badges:
        assert isinstance(word, Letters) and word.text in (*OUTCOMES, "available")
        assert box.x < word.x and word.x + brush.measure(word.text, word.style) < box.x + box.width


def test_all_that_is_to_be_said_is_in_it_and_no_name_of_a_user(brush, tmp_path):
    everything = found(HERE, tmp_path, FOUND)
    written = "".join(item.text for item in lines_by_column(draw(everything, brush.measure))).replace(" ", "")
    for one in everything.diagnoses:
        for text in (one.cause, one.advice, one.cure.text if one.cure and not one.helpless else ""):
            assert text.replace(" ", "") in written, (one.kernel.name, text)
    assert "x" * 250 in written and "undefinedsymbol" in written
    assert "alice" not in written and sys.executable not in written
    assert "python-mpipinstall" in written and "\x1b" not in written


def test_a_name_in_letters_that_no_font_has_is_painted_all_the_same(brush, tmp_path):
    strange = Device("cuda:0", "显卡 \U000f1234 Größe", GPU.architecture, GPU.capability, 32 << 30)
    drawing = draw(found(Machine((strange, CPU)), tmp_path, {}), brush.measure)
    assert brush.paint(drawing).shape[2] == 3


@pytest.mark.parametrize("broken", ["matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"])
def test_without_matplotlib_pillow_paints_it(tmp_path, monkeypatch, broken):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, broken, None)
    everything, brush = found(HERE, tmp_path, FOUND), paint.Pillow()
    assert numpy.array_equal(paint.picture(everything), brush.paint(draw(everything, brush.measure)))


UNTOUCHED = """
import test_doctor_node as t
import matplotlib
from pathlib import Path
before = matplotlib.rcParams.copy()  # plain values: reading them one by one would choose a back end
everything, brush = t.found(t.HERE, Path(), t.FOUND), t.paint.Matplotlib()
assert t.numpy.array_equal(t.paint.picture(everything), brush.paint(t.draw(everything, brush.measure)))
assert "matplotlib.pyplot" not in t.sys.modules
now = matplotlib.rcParams.copy()
assert all(dict.__getitem__(now, name) == dict.__getitem__(before, name) for name in before.keys() | now.keys())
"""


@pytest.mark.skipif(WITHOUT, reason=NOT_INSTALLED)
def test_matplotlib_is_used_without_touching_what_is_global(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from support import loading\n"
    code += "loading.load_package('comfyui_attune', loading.ROOT)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + UNTOUCHED], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
