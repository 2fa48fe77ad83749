"""The command `attune compare`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any


def _ratio(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"wanted a number above 0, found {text}")
    return value


def _read(a: Path, b: Path) -> list[dict[str, Any]]:
    """Both results, ready to be compared. Raises NotAResultError, or OSError."""
    from .bench_file import NotAResultError, read_result
    from .workflow_result import is_workflow_result, read_workflow_result

    whole = [is_workflow_result(path) for path in (a, b)]
    found = [
        read_workflow_result(path) if of_one else read_result(path) for path, of_one in zip((a, b), whole, strict=True)
    ]
    if whole[0] != whole[1]:
        one, other = (a, b) if whole[0] else (b, a)
        raise NotAResultError(
            f"{one} is of whole workflows (attune bench --workflow), {other} of single calls: compare two of one kind"
        )
    return found


def _compare(options: argparse.Namespace) -> int:
    from .bench_file import NotAResultError
    from .compare import compare, comparison_text

    try:
        a, b = _read(options.a, options.b)
    except (NotAResultError, OSError) as error:
        print(f"attune compare: {error}", file=sys.stderr)
        return 2
    found = compare(a, b)
    print(comparison_text(found, options.markdown))
    if options.fail_under is None:
        return 0
    if not found.pairs and not found.lost:
        print("attune compare: --fail-under needs rows that both files measured", file=sys.stderr)
        return 2
    below = found.below(options.fail_under)
    for line in below:
        print(f"below {options.fail_under:g}: {line}", file=sys.stderr)
    return 1 if below else 0


def add_compare(commands: Any) -> None:
    """Add `compare` to the parser's commands."""
    about = "two results of bench, row by row: what is faster, what only scatters, how the machines differ"
    parser = commands.add_parser("compare", help=about, description=about)
    parser.add_argument("a", type=Path, metavar="A", help="a result of bench, JSON or CSV")
    parser.add_argument("b", type=Path, metavar="B", help="the other one")
    parser.add_argument(
        "--fail-under",
        type=_ratio,
        metavar="RATIO",
        help="exit with 1 where B has less than RATIO times the speed of A in any row, or no longer runs it",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown, for pasting")
    parser.set_defaults(run=_compare)
