"""The command `attune quarantine`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .packages import WATCHED, environment, find, fingerprint, metadata_names, normal
from .quarantine import State, off, reason, store
from .store import Store, home

EFFECT = "It counts from the next start of ComfyUI."


def _package(text: str) -> str:
    """The import name that a user means: sageattention, flash-attn, flash_attn, …"""
    for name, watched in WATCHED.items():
        if normal(text) in (normal(name), *map(normal, watched.distributions)):
            return name
    raise argparse.ArgumentTypeError(
        f"unknown package {text!r}: wanted one that ComfyUI imports at its start: {', '.join(WATCHED)}"
    )


def _store(options: argparse.Namespace) -> Store:
    return store(options.home.absolute() if options.home else home(options.pack))


def _add(options: argparse.Namespace) -> int:
    def change(state: State) -> None:
        if options.package not in state.added:
            state.added.append(options.package)

    if not _store(options).update(change):
        return 1
    print(f"{options.package} is in quarantine until `attune quarantine remove {options.package}`. {EFFECT}")
    return 0


def _remove(options: argparse.Namespace) -> int:
    name, said = options.package, []

    def change(state: State) -> None:
        if name in state.added:
            state.added.remove(name)
            said.append(f"{name} is no longer kept out on request. {EFFECT}")
        bad = [key for key, verdict in state.verdicts.get(name, {}).items() if verdict.harmful]
        if new := [key for key in bad if key not in state.lifted]:
            state.lifted += new
            why = reason(state.verdicts[name][bad[-1]])
            said.append(
                f"{name} has left quarantine and is imported as it is, although {why}. {EFFECT} "
                f"Should ComfyUI not start then: `attune quarantine add {name}`."
            )

    file = _store(options)
    if not file.update(change):
        return 1
    print("\n".join(said) or f"{name} is not in quarantine according to {file.path}: nothing was changed.")
    return 0


def quarantine_rows(state: State) -> list[dict[str, Any]]:
    metadata = metadata_names()
    around, rows = environment(metadata), []
    for name in WATCHED:
        installed = find(name, metadata)
        key = fingerprint(installed, around) if installed else ""
        verdict = state.verdicts.get(name, {}).get(key)
        row = {"package": name, "version": installed.version if installed else "", "quarantined": False, "notes": []}
        if name in state.added:
            row |= {"quarantined": True, "status": "in quarantine on request"}
        elif installed is None:
            row["status"] = "not installed"
        elif verdict is None:
            row["status"] = "new or changed: ComfyUI's next start looks at it"
        elif verdict.harmful and key not in state.lifted:
            row |= {"quarantined": True, "status": f"in quarantine: {reason(verdict)}"}
        elif verdict.outcome == "works":
            row |= {"status": "can be imported", "notes": list(verdict.notes)}
        else:
            row["status"] = f"{'not in quarantine on request' if verdict.harmful else 'not usable'}: {reason(verdict)}"
        rows.append(row)
    return rows


def _list(options: argparse.Namespace) -> int:
    file = _store(options)
    rows = quarantine_rows(file.read())
    if options.json:
        json.dump({"file": str(file.path), "off": off(), "packages": rows}, sys.stdout, indent=2)
        print()
        return 0
    print(f"{file.path}{' (turned off by ATTUNE or ATTUNE_QUARANTINE)' if off() else ''}")
    for row in rows:
        title = f"{row['package']} {row['version']}".rstrip()
        print("; ".join([f"{title:<24}  {row['status']}", *row["notes"]]))
    return 0


def add_quarantine(commands: Any, pack: Path) -> None:
    """Add `quarantine add|remove|list` to the parser's commands. `pack` is this pack's folder."""
    about = "packages that ComfyUI does not get to see, because importing them would end it"
    parser = commands.add_parser("quarantine", help=about, description=about)
    actions = parser.add_subparsers(dest="action", required=True, metavar="add|remove|list")
    add = actions.add_parser("add", help="keep a package out of ComfyUI until you remove it from here")
    remove = actions.add_parser("remove", help="let ComfyUI import a package again, as it is")
    show = actions.add_parser("list", help="every watched package and what its import did")
    show.add_argument("--json", action="store_true", help="print JSON")
    for action, run in ((add, _add), (remove, _remove), (show, _list)):
        if action is not show:
            action.add_argument("package", type=_package, metavar="PACKAGE", help=", ".join(WATCHED))
        action.add_argument(
            "--home", type=Path, help="the folder of the pack's state, where ComfyUI has another user directory"
        )
        action.set_defaults(run=run, pack=pack)
