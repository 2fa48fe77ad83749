"""`attune compare` on files made by hand, right ones and broken ones."""

from __future__ import annotations

import csv
import io
import json

import pytest

from comfyui_attune import cli
from comfyui_attune.measure import bench_file
from comfyui_attune.measure.bench_file import NotAResultError, read_result
from comfyui_attune.measure.compare import compare, comparison_text
from comfyui_attune.measure.shapes import Shape

SELF, CROSS = Shape("wan self", 1, 2, 64, 64, 16), Shape("wan cross", 1, 2, 64, 8, 16)
MACHINE = {
    "device": "A GPU", "device_name": "cuda:0", "architecture": "Ada, sm_89", "memory_bytes": 2**34, "threads": None,
    "driver": "580.1", "torch": "2.11.0", "cuda": "13.0", "triton": "", "python": "3.12.1", "system": "Windows AMD64",
    "packages": {"sageattention": "2.2.0"}, "fetched": [],
}  # fmt: skip


def row(kernel="sdpa", ms=10.0, spread=0.1, shape=SELF, repeats=9, **fields) -> dict:
    figures = {
        "status": "measured", "verdict": "works", "median_ms": ms, "low_ms": ms * (1 - spread / 2),
        "high_ms": ms * (1 + spread / 2), "repeats": repeats, "tflops": shape.flops / ms / 1e9, "l2": 1e-3,
    }  # fmt: skip
    return {**bench_file.empty_row(shape, "float16"), "kernel": kernel, **figures, **fields}


def failed(kernel="sdpa", shape=SELF, why="out of memory") -> dict:
    return {**bench_file.empty_row(shape, "float16"), "kernel": kernel, "status": "failed", "reason": why}


def result(*rows, **machine) -> dict:
    return {
        "kind": "attune bench", "schema": 1, "units": dict(bench_file.UNITS), "machine": {**MACHINE, **machine},
        "peak_tflops": {}, "interrupted": "", "rows": list(rows),
    }  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """save(result, "a.json"): a file with it, as JSON or CSV by its name; its path as text."""

    def one(data, name):
        path = tmp_path / f"é {name}"
        path.write_text((bench_file.as_csv if name.endswith("csv") else bench_file.as_json)(data), "utf-8", newline="")
        return str(path)

    return one


# The comparison.


def test_a_ratio_above_one_says_that_b_is_faster():
    (pair,) = compare(result(row(ms=10)), result(row(ms=8))).pairs
    assert pair.ratio == 1.25 and pair.verdict == "faster"
    (pair,) = compare(result(row(ms=8)), result(row(ms=10))).pairs
    assert pair.ratio == 0.8 and pair.verdict == "slower"


@pytest.mark.parametrize(
    ("ms", "spread", "verdict"),
    [
        (9.6, 0.1, "within the spread"),  # 9.5 to 10.5 and 9.12 to 10.08
        (9.0, 0.1, "faster"),  # up to 9.45
        (9.0, 0.2, "within the spread"),  # up to 9.9
        (11.2, 0.1, "slower"),  # from 10.64
        (10.0, 0.0, "within the spread"),
    ],
)
def test_a_difference_counts_where_the_middle_halves_do_not_overlap(ms, spread, verdict):
    (pair,) = compare(result(row(ms=10, spread=0.1)), result(row(ms=ms, spread=spread))).pairs
    assert pair.verdict == verdict


def test_of_few_repeats_the_spread_is_not_known():
    (pair,) = compare(result(row(ms=10, repeats=2)), result(row(ms=5))).pairs
    assert pair.verdict == "spread unknown"


def test_rows_are_joined_by_kernel_shape_and_type_whatever_their_order():
    a = result(row("sdpa"), row("split", 30), row("sdpa", 2, shape=CROSS))
    b = result(row("sdpa", 4, shape=CROSS), row("split", 15), row("sdpa"))
    found = compare(a, b)
    assert [(pair.a["kernel"], pair.a["shape"], pair.ratio) for pair in found.pairs] == [
        ("sdpa", "wan self", 1.0), ("split", "wan self", 2.0), ("sdpa", "wan cross", 0.5),
    ]  # fmt: skip
    other_type = {**row(), "dtype": "bfloat16"}
    assert not compare(result(row()), result(other_type)).pairs
    assert not compare(result(row()), result({**row(), "q_len": 65})).pairs, "one name, other numbers"


def test_rows_of_one_file_only_are_told_apart_by_why():
    a = result(row("sdpa"), row("split"), row("flash2"), failed("sage1", why="no sm_80"), failed("sage3"))
    b = result(failed("sdpa", why="out of memory"), row("split"), row("xformers"), row("sage1"), failed("sage3"))
    found = compare(a, b)
    assert [(one["kernel"], why) for one, why in found.lost] == [("sdpa", "out of memory")]
    assert [(one["kernel"], why) for one, why in found.gained] == [("sage1", "no sm_80")]
    assert [one["kernel"] for one in found.only_a] == ["flash2"]
    assert [one["kernel"] for one in found.only_b] == ["xformers"]
    text = comparison_text(found)
    for line in ("sdpa, wan self, float16: out of memory", "Only in A:\n  flash2", "Only in B:\n  xformers"):
        assert line in text


def test_what_differs_between_the_machines_is_listed():
    found = compare(result(row()), result(row(), driver="590.2", torch="2.12.0", packages={"xformers": "0.0.35"}))
    assert found.machines == [
        ("driver", "580.1", "590.2"), ("torch", "2.11.0", "2.12.0"),
        ("sageattention", "2.2.0", "-"), ("xformers", "-", "0.0.35"),
    ]  # fmt: skip
    assert "The files tell no difference" in comparison_text(compare(result(row()), result(row())))


# The files.


@pytest.mark.parametrize("first", ["a.json", "a.csv"])
@pytest.mark.parametrize("second", ["b.json", "b.csv"])
def test_json_and_csv_can_be_compared_with_each_other(save, capsys, first, second):
    a = save(result(row("sdpa", 10), row("split", 30), failed("sage1")), first)
    b = save(result(row("sdpa", 5), row("split", 30), failed("sage1"), torch="2.12.0"), second)
    assert cli.main(["compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "2.000  faster" in text and "1.000  within the spread" in text
    assert "Of 2 rows B is faster in 1, slower in 0" in text
    assert "2.12.0" in text and "2.11.0" in text and "driver" not in text


def test_a_csv_that_went_through_a_spreadsheet_is_read(save, tmp_path):
    text = bench_file.as_csv(result(row("sdpa", 10), row("split", 30)))
    lines = list(csv.reader(io.StringIO(text)))
    turned = [[*line[::-1], "note"] for line in lines]  # columns in another order, and one more
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerows(turned)
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode())
    assert [one["median_ms"] for one in read_result(path)["rows"]] == [10.0, 30.0]


WHOLE = bench_file.as_json(result(row()))
TABLE = bench_file.as_csv(result(row(), row("split")))
HEAD, FIRST, SECOND = TABLE.splitlines(keepends=True)
DATA = json.loads(WHOLE)
# What is wrong: the file's name, its text, what has to be said.
BROKEN = {
    "empty": ("x.json", "", "is empty"),
    "blank": ("x.csv", "\n  \n", "is empty"),
    "cut off": ("x.json", WHOLE[: len(WHOLE) // 2], "damaged or cut off"),
    "cut off in a line": ("x.csv", TABLE[:-60], "damaged or cut off at line 3"),
    "cut off at a line's end": ("x.csv", HEAD + FIRST, "1 of 2 rows"),
    "cut off in the last number": ("x.csv", TABLE[:-2], "2 of '' rows"),
    "cut off in quotes": ("x.csv", HEAD + FIRST + SECOND.replace("split", '"split'), "damaged or cut off"),
    "only the head": ("x.csv", HEAD, "holds no rows"),
    "no rows": ("x.json", bench_file.as_json(result()), "holds no rows"),
    "other units": ("x.json", json.dumps({**DATA, "units": {"time": "s"}}), "has other units"),
    "other units, CSV": ("x.csv", TABLE.replace("median_ms", "median_s"), "no column median_ms; it has 'median_s'"),
    "another schema": ("x.json", json.dumps({**DATA, "schema": 2}), "wanted schema 1, found 2"),
    "another schema, CSV": ("x.csv", TABLE.replace("bench,1,", "bench,2,"), "wanted schema 1, found '2'"),
    "another kind": ("x.json", json.dumps({**DATA, "kind": "attune run"}), "found 'attune run'"),
    "a list": ("x.json", "[1, 2]", "it holds a list"),
    "some text": ("x.csv", "Dear reader,\nthis is a letter.\n", "no result of attune bench"),
    "no number": ("x.csv", TABLE.replace(",10.0,", ",ten,"), "damaged at line 2"),
    "no time": ("x.json", json.dumps(result(row(median_ms=None))), "median_ms is None, wanted a number"),
    "time zero": ("x.json", json.dumps(result(row(median_ms=0))), "its time is 0"),
    "no field": ("x.json", json.dumps(result({"kernel": "sdpa"})), "has no shape"),
    "not a row": ("x.json", json.dumps(result(7)), "it is a int"),
    "another status": ("x.json", json.dumps(result(row(status="fine"))), "status 'fine'"),
    "not text": ("x.json", json.dumps(result(row(kernel=3))), "kernel is 3, wanted text"),
    "twice": ("x.json", json.dumps(result(row(), row())), "is there twice"),
    "two machines": ("x.csv", TABLE + FIRST.replace("2.11.0", "2.12.0"), "several machines"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_with_its_name_and_what_is_wrong(save, tmp_path, capsys, name):
    file, text, said = BROKEN[name]
    path = tmp_path / file
    path.write_text(text, "utf-8", newline="")
    for pair in ([str(path), save(result(row()), "b.json")], [save(result(row()), "a.csv"), str(path)]):
        assert cli.main(["compare", *pair]) == 2
        told = capsys.readouterr()
        assert told.err.startswith("attune compare: ") and str(path) in told.err and said in told.err, told.err
        assert told.out == ""


def test_a_binary_file_and_one_that_is_not_there_are_told(save, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(NotAResultError, match="not text"):
        read_result(path)
    assert cli.main(["compare", save(result(row()), "a.json"), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize("write", [bench_file.as_json, bench_file.as_csv])
def test_a_result_cut_off_anywhere_is_never_taken_for_a_whole_one(tmp_path, write):
    text = write(result(*(row(name) for name in "abcdefghijkl"), row(shape=CROSS))).rstrip("\n")
    path = tmp_path / "x"
    for end in (*range(0, len(text), 7), len(text) - 1):
        path.write_text(text[:end], "utf-8", newline="")
        with pytest.raises(NotAResultError):
            read_result(path)
    path.write_text(text, "utf-8", newline="")
    assert len(read_result(path)["rows"]) == 13


# The exit status, and Markdown.


@pytest.mark.parametrize(("ratio", "status"), [("0.75", 0), ("0.8", 0), ("0.81", 1), ("1.5", 1)])
def test_fail_under_is_about_the_slowest_row(save, capsys, ratio, status):
    a = save(result(row("sdpa", 8), row("split", 30)), "a.json")
    b = save(result(row("sdpa", 10), row("split", 15)), "b.json")
    assert cli.main(["compare", a, b, "--fail-under", ratio]) == status
    assert ("sdpa, wan self, float16: 0.800" in capsys.readouterr().err) is (status == 1)


def test_a_kernel_that_does_not_run_any_more_is_under_every_ratio(save, capsys):
    a, b = save(result(row(), row("split")), "a.json"), save(result(failed(), row("split")), "b.json")
    assert cli.main(["compare", a, b, "--fail-under", "0.01"]) == 1
    assert "not measured any more (out of memory)" in capsys.readouterr().err


def test_with_nothing_in_common_fail_under_does_not_pass(save, capsys):
    a, b = save(result(row("sdpa")), "a.json"), save(result(row("split")), "b.json")
    assert cli.main(["compare", a, b]) == 0
    assert "No row was measured in both files." in capsys.readouterr().out
    assert cli.main(["compare", a, b, "--fail-under", "0.5"]) == 2


@pytest.mark.parametrize("ratio", ["0", "-1", "nan", "inf", "much"])
def test_a_ratio_that_is_none_is_refused(save, ratio):
    a = save(result(row()), "a.json")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", a, a, f"--fail-under={ratio}"])
    assert stopped.value.code == 2


def test_markdown_is_a_table_for_pasting(save, capsys):
    a = save(result(row("sdpa", 10, shape=Shape("a|b", 1, 2, 64, 64, 16)), row("flash2")), "a.json")
    b = save(result(row("sdpa", 5, shape=Shape("a|b", 1, 2, 64, 64, 16)), torch="2.12.0"), "b.json")
    assert cli.main(["compare", a, b, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| kernel | shape | type | A (spread) | B (spread) | A / B | B is |"
    assert lines[1] == "| --- | --- | --- | --- | --- | --- | --- |"
    assert lines[2] == "| sdpa | a\\|b | float16 | 10.0 ms (10.0%) | 5.00 ms (10.0%) | 2.000 | faster |"
    assert "- flash2, wan self, float16" in lines and "| torch | 2.11.0 | 2.12.0 |" in lines
