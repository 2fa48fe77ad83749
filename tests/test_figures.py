"""What is made of results of `attune bench`: the README's section of benchmarks, the picture, the table."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_bench import long_result

from comfyui_attune.measure import bench_file, bench_plot, bench_table
from support.loading import ROOT

SPEC = importlib.util.spec_from_file_location("attune_figures", ROOT / "benchmarks" / "figures.py")
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)

CPU = next(path for path, result in figures.results(ROOT / "benchmarks" / "results") if figures.on_cpu(result))


def test_the_readme_is_as_the_results_in_the_repository_are(capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().out
    text = (ROOT / "README.md").read_text("utf-8")
    found = figures.results(ROOT / "benchmarks" / "results")
    assert found, "there is a result to show"
    for path, _ in found:
        assert f"]({figures.picture(path)})" in text
        with Image.open(ROOT / figures.picture(path)) as picture:
            assert min(picture.size) > 1000


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository with the CPU's result, another benchmark's file, and a README whose section is empty."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    for path in (tmp_path / "benchmarks" / "results").glob("*.json"):
        if path.name not in (CPU.name, "dispatch-cpu.json"):
            path.unlink()
    (tmp_path / "README.md").write_text(f"# é\n\n{figures.BEGIN}\nold\n{figures.END}\n\nrest\n", "utf-8")
    return tmp_path


def put(root: Path, name: str, **changes) -> dict:
    """One more result: the CPU's with other fields; `machine` and `row` change fields of the machine and each row."""
    result = json.loads(CPU.read_text("utf-8"))
    result["machine"].update(changes.pop("machine", {}))
    for row in result["rows"]:
        row.update(changes.get("row", {}) if row["status"] == "measured" else {})
    changes.pop("row", None)
    result.update(changes)
    (root / "benchmarks" / "results" / name).write_text(json.dumps(result), "utf-8")
    return result


def section(root: Path) -> str:
    text = (root / "README.md").read_text("utf-8")
    assert text.startswith(f"# é\n\n{figures.BEGIN}\n") and text.endswith(f"{figures.END}\n\nrest\n")
    return text.partition(figures.BEGIN)[2].partition(figures.END)[0]


def test_the_command_makes_section_and_picture_and_a_second_run_changes_nothing(root, capsys):
    assert figures.main(["--check"], root) == 1 and "README.md" in capsys.readouterr().out
    assert "old" in section(root), "--check changes nothing"
    assert figures.main([], root) == 0
    text, picture = section(root), root / "docs" / "images" / f"bench-{CPU.stem}.png"
    assert "No GPU has been measured yet" in text and "dispatch" not in text
    assert f"benchmarks/results/{CPU.name}" in text and json.loads(CPU.read_text("utf-8"))["started"][:10] in text
    assert text.count("| `sdpa` | 1.00 |") == 1
    drawn = picture.read_bytes()
    assert figures.main([], root) == 0 and section(root) == text and picture.read_bytes() == drawn
    assert figures.main(["--check"], root) == 0
    picture.unlink()
    assert figures.main(["--check"], root) == 1


def test_the_figures_are_those_of_the_rows(root):
    result = json.loads(CPU.read_text("utf-8"))
    row = next(row for row in result["rows"] if row["kernel"] == "sdpa")
    rows = [
        {**row, "shape": "a", "median_ms": 10.0, "tflops": 1.0},
        {**row, "shape": "b", "median_ms": 20.0, "tflops": 2.0, "l2": 0.5},
        {**row, "shape": "a", "kernel": "split", "median_ms": 5.0, "tflops": 2.0, "l2": 0.01},
        {**row, "shape": "b", "kernel": "split", "median_ms": 80.0, "tflops": 0.5, "l2": 0.02},
        {**row, "shape": "a", "kernel": "flash2", "median_ms": 2.0, "tflops": 5.0, "l2": None, "verdict": "NaN"},
        {**row, "shape": "b", "kernel": "flash2", "status": "failed"},
        {**row, "shape": "a", "kernel": "sage1", "status": "refused"},
    ]
    assert figures.table(rows).splitlines() == [
        "| kernel | float32: speed | error |",
        "|---|---|---|",
        "| `flash2` | 5.00, 1 of 2 shapes | not a number, **wrong** |",
        "| `split` | 1.12 (0.25 to 2.00) | 2.0e-02 |",
        "| `sdpa` | 1.00 | 5.0e-01 |",
    ]
    assert figures.table(rows[2:4]).endswith("| `split` | – | 2.0e-02 |"), "nothing to compare with"
    assert figures.table([*rows[2:4], {**rows[0], "dtype": "float16"}]).splitlines() == [
        "| kernel | float32: speed | error | float16: speed | error |",
        "|---|---|---|---|---|",
        f"| `sdpa` | – | – | 1.00 | {rows[0]['l2']:.1e} |",
        "| `split` | – | 2.0e-02 | – | – |",
    ]
    put(root, "broken-2026-01-01.json", rows=rows, interrupted="Ctrl+C", machine={"device": "Other CPU"})
    assert figures.main([], root) == 0
    assert "Incomplete: Ctrl+C." in section(root) and "reasons in the file: `sage1`." in section(root)


def test_the_newest_result_of_each_machine_counts_and_a_gpu_comes_first(root):
    put(root, "cpu-2030-01-01.json", started="2030-01-01T00:00:00+00:00")
    assert figures.main([], root) == 0
    images = root / "docs" / "images"
    assert [path.name for path in images.iterdir()] == ["bench-cpu-2030-01-01.png"]
    put(root, "cpu-2031-01-01.json", started="2031-01-01T00:00:00+00:00")
    put(root, "zz-2020-01-01.json", machine={"device": "A GPU", "architecture": "Ada, sm_89"})
    assert figures.main(["--check"], root) == 1
    assert figures.main([], root) == 0
    names = sorted(path.name for path in images.iterdir())
    assert names == ["bench-cpu-2031-01-01.png", "bench-zz-2020-01-01.png"], "the older picture is gone"
    text = section(root)
    assert "No GPU" not in text and text.index("**A GPU**") < text.index("cpu-2031-01-01.json")
    assert "2030" not in text


@pytest.mark.parametrize(
    "readme", ["no marks", f"{figures.END} {figures.BEGIN}", f"{figures.BEGIN} {figures.BEGIN} {figures.END}"]
)
def test_a_readme_without_the_marks_is_left_alone(root, readme, capsys):
    (root / "README.md").write_text(readme, "utf-8")
    assert figures.main([], root) == 2
    assert "wanted <!-- figures: begin -->" in capsys.readouterr().err
    assert (root / "README.md").read_text("utf-8") == readme and not (root / "docs").exists()


def test_a_damaged_result_is_named(root, capsys):
    (root / "benchmarks" / "results" / "cut.json").write_text(CPU.read_text("utf-8")[:500], "utf-8")
    assert figures.main([], root) == 2
    assert "cut.json is damaged or cut off" in capsys.readouterr().err


# The picture, as `attune bench --plot` draws it too.


def varied() -> dict:
    """A result of many kernels, in which no two have the same speed and error, one is wrong, and one has no figures."""
    result = long_result()
    for number, row in enumerate(row for row in result["rows"] if row["status"] == "measured"):
        low, far = row["median_ms"] * 0.95, 1 + sum(map(ord, row["kernel"])) % 29
        row.update(tflops=50.0 * far + number % 7, low_ms=low, high_ms=row["median_ms"] * 1.1, l2=1e-5 * 1.3**far)
        if row["kernel"] == "sdpa_flash":
            row.update(verdict="wrong numbers: NaN or infinity", l2=None)
        row["shape"] = row["shape"].replace("832", "$832$")  # no mathematics
    return result


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a result: every text that is seen with its box (x0, y0, x1, y1) in pixels, and the picture's size."""
    from matplotlib.text import Text

    seen, draw_text = [], Text.draw

    def note(self, renderer):
        if self.get_text():
            seen.append((self.get_text(), Text.get_window_extent(self, renderer).extents))
        draw_text(self, renderer)

    monkeypatch.setattr(Text, "draw", note)

    def draw(result: dict):
        bench_plot.save_plot(result, tmp_path / "x.png", "somewhere.json")
        with Image.open(tmp_path / "x.png") as picture:
            return seen, picture.size

    return draw


@pytest.mark.parametrize("make", [varied, lambda: json.loads(CPU.read_text("utf-8"))], ids=["GPU", "CPU"])
def test_nothing_in_the_picture_is_cut_off_or_lies_on_other_words(drawn, make):
    result = make()
    seen, (width, height) = drawn(result)
    for place, (text, (x0, y0, x1, y1)) in enumerate(seen):
        assert x0 >= 0 and x1 <= width and y0 >= 0 and y1 <= height, f"{text!r} is cut off"
        for other, (left, low, right, high) in seen[place + 1 :]:
            overlap = min(x1, right) - max(x0, left), min(y1, high) - max(y0, low)
            assert min(overlap) <= 2, f"{text!r} lies on {other!r}"
    texts = [text for text, _ in seen]
    assert "ComfyUI-Attune, attune bench, somewhere.json" in texts
    for kernel in {row["kernel"] for row in result["rows"] if row["verdict"] == "works"}:
        dtypes = len({row["dtype"] for row in result["rows"]})
        assert texts.count(kernel) == 1 + dtypes, "in the legend, and at its point in each data type"
    assert ("wrong numbers" in texts) is (make is varied) and texts.count("sdpa_flash") == (1 if make is varied else 2)


def test_many_shapes_are_several_panels_with_short_attention_apart():
    rows = [row for row in long_result()["rows"] if row["status"] == "measured"]
    panels = list(bench_plot._panels(rows))
    assert sorted(map(id, (row for _, members in panels for row in members))) == sorted(map(id, rows))
    told = [(dtype, {row["shape"].split()[-1] for row in members}) for dtype, members in panels]
    assert told == [(dtype, {kind}) for dtype in ("float16", "bfloat16") for kind in ("self", "cross")]


def test_others_may_read_a_result(tmp_path):
    (tmp_path / "plain").write_text("", "utf-8")
    bench_file.write(tmp_path / "r.json", "{}")
    assert (tmp_path / "r.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


# The table.


def test_a_reason_is_told_whole_and_one_that_differs_in_its_numbers_is_told_once():
    row = next(row for row in long_result()["rows"] if row["status"] == "refused")
    whole = "package a is not installed (pip install a (compiles; takes an hour))"
    rows = [
        {**row, "kernel": "a", "shape": "s1", "reason": f"{whole}; no sm_90"},
        {**row, "kernel": "a", "shape": "s2", "reason": f"{whole}; no sm_90"},
        *(
            {**row, "kernel": "b", "shape": f"s{number}", "reason": f"needs {number}.5 GiB, 3.1 GiB are free"}
            for number in (1, 2, 3)
        ),
    ]
    text = bench_table.table({**long_result(), "rows": rows})
    assert f"  {whole} (s1 float16, s2 float16): a\n" in text
    assert "  needs 1.5 GiB, 3.1 GiB are free (s1 float16; 2 more with other numbers): b\n" in text
    assert text.count("GiB are free") == 1


@pytest.mark.parametrize(
    ("tflops", "text"),
    [(0.00023456, "0.00023"), (0.0000123, "1.2e-05"), (0.0567, "0.057"), (1.234, "1.23"), (812.3, "812")],
)
def test_a_slow_kernel_has_a_speed_that_is_not_nought(tflops, text):
    assert bench_table.speed_text(tflops) == text
