"""The command `attune workflow`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..attention.policy import KERNEL_NAMES
from ..measure.workflow_file import WorkflowError
from .book import Book
from .files import Document, read, save
from .text import say

Edit = Callable[[Book, argparse.Namespace], Any]


def _book(document: Document) -> Any:
    from .api import ApiBook

    return ApiBook(document.workflow) if document.api else Book(document.workflow)


def _guarded(act: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """One line for what is wrong, and status 2."""

    def run(options: argparse.Namespace) -> int:
        from ..measure.workflow_server import ServerError

        try:
            return act(options)
        except (WorkflowError, ServerError) as error:
            say(f"attune workflow: {error}", sys.stderr)
        except FileNotFoundError as error:
            where = error.filename or options.file
            say(f"attune workflow: there is no file {where}: look at its name and folder", sys.stderr)
        except OSError as error:
            where = error.filename or options.file
            say(f"attune workflow: {where}: {error.strerror or error}; nothing was changed", sys.stderr)
        except KeyboardInterrupt:
            say("attune workflow: stopped; nothing was changed", sys.stderr)
            return 130
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, RecursionError) as error:
            say(
                f"attune workflow: {options.file} is damaged ({type(error).__name__}: {error}): open it in ComfyUI, "
                "save it there, and try again; nothing was changed",
                sys.stderr,
            )
        return 2

    return run


def _change(edit: Edit) -> Callable[[argparse.Namespace], int]:
    def act(options: argparse.Namespace) -> int:
        document = read(options.file)
        book = _book(document)
        done = edit(book, options)
        if document.api:
            book.write_back()
        _book(document)  # what is written can be read again
        if done.changed or options.out is not None:
            kept = save(document, options.out, not options.no_backup)
        for line in [*done.changed, *done.notes]:
            say(line)
        if not done.changed and options.out is None:
            say(f"{options.file} is as it was")
        else:
            was = f" (as it was: {kept})" if kept else ""
            say(f"written: {options.out or options.file}{was}")
        return 0

    return _guarded(act)


def _insert(book: Book, options: argparse.Namespace) -> Any:
    from .edit import insert

    if options.kernel not in KERNEL_NAMES:
        raise WorkflowError(f"--kernel {options.kernel}: there is none of that name. Wanted: {', '.join(KERNEL_NAMES)}")
    return insert(book, options.kernel, options.precision)


def _switch(on: bool) -> Edit:
    def act(book: Book, options: argparse.Namespace) -> Any:
        from .edit import switch

        return switch(book, on, options.type, options.id)

    return act


def _remove(book: Book, options: argparse.Namespace) -> Any:
    from .edit import remove

    return remove(book, options.type, options.id)


def _upgrade(book: Book, options: argparse.Namespace) -> Any:
    from .upgrade import upgrade

    return upgrade(book)


def _show(options: argparse.Namespace) -> int:
    from .edit import attention_nodes, rows

    document = read(options.file)
    book = _book(document)
    found, nodes = rows(book), attention_nodes(book)
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        print()
        return 0
    form = "API format" if document.api else "as ComfyUI saves it"
    inside = f", read from {document.medium}" if document.medium else ""
    say(f"{options.file}: {form}{inside}, {sum(len(graph.nodes) for graph in book.graphs())} nodes")
    if not found:
        say("no model branch: no node samples with a model of ComfyUI's own (type MODEL)")
    for row in found:
        say(f"{row['described']}{_state(row)}, {row['input']}:")
        for one in row["attention"]:
            kernel = f": {one['kernel']}" if one["kernel"] else ""
            say(f"    {one['described']}{kernel}{_state(one)}")
        if not row["attention"]:
            say("    no attention node")
        elif not row["on_every_way"]:
            say("    on some of the ways to it only")
    on_branches = {one["described"] for row in found for one in row["attention"]}
    for graph, node in nodes:
        if (what := graph.described(node)) not in on_branches:
            say(f"{what}: on no model branch")
    return 0


def _state(row: dict[str, Any]) -> str:
    return "" if row["state"] == "active" else f" [{row['state']}]"


def _run(options: argparse.Namespace) -> int:
    from .run import run

    return run(read(options.file, to_run=True), options.server)


def add_workflow(commands: Any) -> None:
    """Add `workflow` to the parser's commands."""
    about = "what stands in a workflow file about attention; nodes put in, taken out, bypassed, replaced; run it"
    parser = commands.add_parser("workflow", help=about, description=about)
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")

    def add(name: str, what: str, act: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = actions.add_parser(name, help=what, description=what)
        one.add_argument("file", type=Path, metavar="FILE", help="a workflow: .json, or a PNG, WebP, MP4 or WebM")
        one.set_defaults(run=act)
        return one

    def change(name: str, what: str, edit: Edit, chosen: str = "") -> argparse.ArgumentParser:
        one = add(name, what, _change(edit))
        if chosen:
            one.add_argument("--type", action="append", default=[], metavar="T", help=f"nodes of this type ({chosen})")
            one.add_argument("--id", action="append", default=[], metavar="N", help='node N; "38:5": 5 in subgraph 38')
        one.add_argument("-o", dest="out", type=Path, metavar="OUT", help="write there, and leave FILE as it is")
        one.add_argument("--no-backup", action="store_true", help="keep no copy (NAME.bak) of what is overwritten")
        return one

    show = add("show", "the attention nodes on each model branch", _guarded(_show))
    show.add_argument("--json", action="store_true", help="print a JSON list of branches")
    every = "without it and --id: all attention nodes"
    change("bypass", "bypass attention nodes", _switch(False), every)
    change("enable", "enable what `bypass` bypassed; where nothing was, all bypassed ones", _switch(True), every)
    insert = change("insert", "put an AttentionSelector on every model branch that has none", _insert)
    insert.add_argument("--kernel", default="auto", metavar="NAME", help="the kernel it asks for (auto)")
    insert.add_argument("--precision", choices=("exact", "fast"), default="exact", help="for auto: may it be 8 bits?")
    change("remove", "take this pack's attention nodes out", _remove, "without it and --id: all of this pack")
    change("upgrade", "replace Sage3AttentionOnlySwitch and KJNodes' attention patches by this pack's nodes", _upgrade)
    run = add("run", "run it on a ComfyUI that is running", _guarded(_run))
    run.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="its address (%(default)s)")
