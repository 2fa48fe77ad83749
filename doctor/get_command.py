"""The command `attune get`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .hub import OFFERS, HubError, Record, fetched, folder, offer, records
from .hub_fetch import Found, Hub, fetch
from .store import home


def _list(place: Path) -> int:
    state, found = records(place).read(), fetched(place)
    width = max(map(len, OFFERS))
    for name, entry in OFFERS.items():
        record = state.get(name)
        if record is None:
            said = f"not fetched; {entry.repo}"
        else:
            said = found[name].refused or f"fetched: {record.repo} at {record.revision[:12]}, {record.variant}"
        print(f"{name:<{width}}  {said}")
    return 0


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _agreed(options: argparse.Namespace) -> Any:
    def ask(found: Found) -> bool:
        record = found.record
        version = f"version {found.version.removeprefix('v')}, " if found.version.startswith("v") else ""
        print(f"{options.name}: {record.repo}, {version}commit {record.revision}")
        print(f"  build    {record.variant}")
        print(f"  size     {_size(record.size)}")
        print(f"  licence  {record.licence}")
        if found.python_packages:
            print(f"  needs    {', '.join(found.python_packages)} (Python packages, not fetched by this)")
        print(f"  goes to  {folder(options.place, record)}")
        if options.yes:
            return True
        if not sys.stdin.isatty():
            print("There is nobody to ask. Add --yes to fetch without asking.", file=sys.stderr)
            return False
        return input("Fetch this? It is code that will run here. [y/N] ").strip().lower() in ("y", "yes")

    return ask


def _get(options: argparse.Namespace) -> int:
    options.place = home(options.pack)
    if options.name is None:
        return _list(options.place)
    try:
        offer(options.name)
        record: Record | None = fetch(options.name, options.place, Hub(), _agreed(options), options.revision)
    except HubError as error:
        print(f"{error}\nNothing was fetched.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing was fetched.", file=sys.stderr)
        return 130
    except Exception as error:  # the network, the Hub and the disk, each with its own errors
        print(f"{type(error).__name__}: {error}\nNothing was fetched.", file=sys.stderr)
        return 1
    if record is None:
        print("Nothing was fetched.")
        return 1
    print(f"{options.name} was fetched. It is used where no package for it is installed, from ComfyUI's next start on.")
    return 0


def add_get(commands: Any, pack: Path) -> None:
    """Add `get [NAME]` to the parser's commands. `pack` is this pack's folder."""
    about = "fetch a prebuilt kernel from the Hugging Face Hub; without a name, list them"
    parser = commands.add_parser("get", help=about, description=about)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(OFFERS)}")
    parser.add_argument("--revision", default="", metavar="COMMIT", help="this commit, not that of the newest version")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=_get, pack=pack)
