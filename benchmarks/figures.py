"""Draw the README's section "Benchmarks" from the results of `attune bench` in benchmarks/results.

    python . bench --shapes smoke --dtypes fp32 --json benchmarks/results/cpu-<date>.json
    python benchmarks/figures.py            # pictures into docs/images, text between two marks in README.md
    python benchmarks/figures.py --check    # exit status 1 where the README says something else

Of several results of one machine the newest counts. Nothing is claimed of a GPU without a result of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from support.loading import load_package  # noqa: E402

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
BASELINE = "sdpa"

Result = Mapping[str, Any]


def on_cpu(result: Result) -> bool:
    return result["machine"].get("architecture") == "CPU"


def started(result: Result) -> str:
    return str(result.get("started", ""))


def results(folder: Path) -> list[tuple[Path, Result]]:
    """The newest result of each machine, GPUs first. Other benchmarks' files are passed over.

    Raises ValueError for a file that cannot be read.
    """
    from comfyui_attune.measure.bench_file import KIND, read_result

    newest: dict[tuple[str, str], tuple[Path, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name} is damaged or cut off: {error}") from None
        if not isinstance(data, dict) or data.get("kind") != KIND:
            continue
        result = read_result(path)
        machine = str(result["machine"].get("device")), str(result["machine"].get("architecture"))
        if machine not in newest or started(result) >= started(newest[machine][1]):
            newest[machine] = path, result
    return sorted(newest.values(), key=lambda one: (on_cpu(one[1]), one[0].name))


def picture(path: Path) -> str:
    return f"docs/images/bench-{path.stem}.png"


def cells(rows: Sequence[Mapping[str, Any]], kernel: str, dtype: str) -> tuple[float, str, str]:
    """(speed, and as text; the error) of a kernel in one data type, over all shapes."""
    from comfyui_attune.measure.bench_file import measured

    ran = {(row["kernel"], row["shape"]): row for row in measured(rows) if row["dtype"] == dtype}
    mine = [row for (name, _), row in ran.items() if name == kernel]
    if not mine:
        return 0.0, "–", "–"
    shapes = {row["shape"] for row in rows if row["dtype"] == dtype}
    pairs = [(ran[BASELINE, row["shape"]], row) for row in mine if (BASELINE, row["shape"]) in ran]
    ratios = [base["median_ms"] / row["median_ms"] for base, row in pairs]
    middle = statistics.median(ratios) if ratios else 0.0
    speed = f"{middle:.2f}" if ratios else "–"
    if len({f"{ratio:.2f}" for ratio in ratios}) > 1:
        speed += f" ({min(ratios):.2f} to {max(ratios):.2f})"
    if len(mine) < len(shapes):
        speed += f", {len(mine)} of {len(shapes)} shapes"
    errors = [row["l2"] for row in mine]
    worst = "not a number" if None in errors else f"{max(errors):.1e}"
    return middle, speed, worst + ", **wrong**" * any(row["verdict"] != "works" for row in mine)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each kernel that ran, the fastest first."""
    from comfyui_attune.measure.bench_file import measured

    dtypes = dict.fromkeys(row["dtype"] for row in measured(rows))
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in measured(rows)):
        found = [cells(rows, kernel, dtype) for dtype in dtypes]
        told = " | ".join(f"{speed} | {error}" for _, speed, error in found)
        lines.append((-max(middle for middle, _, _ in found), f"| `{kernel}` | {told} |"))
    head = " | ".join(f"{dtype}: speed | error" for dtype in dtypes)
    return "\n".join(
        [f"| kernel | {head} |", "|---" * (1 + 2 * len(dtypes)) + "|", *(line for _, line in sorted(lines))]
    )


def section(found: Sequence[tuple[Path, Result]]) -> str:
    """What the README says between its marks."""
    from comfyui_attune.measure.bench_file import measured
    from comfyui_attune.measure.bench_table import device_text, machine_text

    parts = []
    if all(on_cpu(result) for _, result in found):
        parts.append("No GPU has been measured yet: there is no figure of one here.")
    for path, result in found:
        title = device_text(result["machine"])
        told = machine_text(result["machine"]).removeprefix(title).lstrip(", ")
        broken = f" Incomplete: {result['interrupted']}." if result.get("interrupted") else ""
        ran = {row["kernel"] for row in measured(result["rows"])}
        absent = dict.fromkeys(f"`{row['kernel']}`" for row in result["rows"] if row["kernel"] not in ran)
        date = started(result)[:10]
        parts += [
            f"**{title}**, {date} ({told}; [{path.name}](benchmarks/results/{path.name})).{broken}",
            f"![Speed of attention kernels by shape, and against their error, on {title}, {date}]({picture(path)})",
            table(result["rows"]),
        ]
        if absent:
            parts.append(f"Not run there, with the reasons in the file: {', '.join(absent)}.")
    if found:
        parts.append(
            f"Speed: `{BASELINE}`'s time over the kernel's, the median over the shapes, and its range. "
            "Error: relative L2 against float32, the worst of all. How it is measured: "
            "[docs/benchmarks.md](docs/benchmarks.md)."
        )
    return "\n\n".join(parts)


def updated(readme: str, text: str) -> str:
    """The README with `text` between its marks. Raises ValueError where they are not there once, in this order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"README.md: wanted {BEGIN} and after it {END}, each once")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where something would change")
    options = parser.parse_args(arguments)
    load_package("comfyui_attune", ROOT)
    readme, images = root / "README.md", root / "docs" / "images"
    try:
        found = results(root / "benchmarks" / "results")
        old = readme.read_text("utf-8")
        new = updated(old, section(found))
    except (ValueError, OSError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    wanted = {root / picture(path): (path, result) for path, result in found}
    stale = [path for path in sorted(images.glob("bench-*.png")) if path not in wanted]
    if options.check:
        wrong = ["README.md"] if old != new else []
        wrong += [path.name for path in [*stale, *(path for path in wanted if not path.is_file())]]
        if wrong:
            print(f"figures: not as the results are: {', '.join(wrong)}. Run: python benchmarks/figures.py")
        return 1 if wrong else 0
    from comfyui_attune.measure.bench_plot import HOW_TO_INSTALL, save_plot

    images.mkdir(parents=True, exist_ok=True)
    try:
        for target, (path, result) in wanted.items():
            save_plot(result, target, f"benchmarks/results/{path.name}")
            print(target.relative_to(root).as_posix())
    except ImportError:
        print(HOW_TO_INSTALL, file=sys.stderr)
        return 1
    for path in stale:
        path.unlink()
    readme.write_text(new, "utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
