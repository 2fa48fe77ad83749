"""The command `attune cache`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .caches import Cache, LeftAloneError, caches
from .store import home

_KINDS = ("triton", "verdicts", "timings")


def _amount(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB" if size else "empty"


def _show(options: argparse.Namespace) -> int:
    for name, found in caches(home(options.pack)).items():
        for cache in found:
            place = cache.place or "no Triton here that says where"
            print(f"{name:<9} {_amount(cache.size()):>10}  {place}  ({cache.about})")
    return 0


def _clear(options: argparse.Namespace) -> int:
    kinds = [name for name in _KINDS if getattr(options, name)] or list(_KINDS)
    found: list[Cache] = [cache for name in kinds for cache in caches(home(options.pack))[name] if cache.size()]
    if not found:
        print(f"Nothing to delete in {', '.join(kinds)}.")
        return 0
    for cache in found:
        print(f"{cache.name}: {_amount(cache.size())} in {cache.place}")
    if not options.yes and not _agreed():
        print("Nothing was deleted.")
        return 1
    failed = False
    for cache in found:
        try:
            print(f"{cache.name}: {_amount(cache.clear())} deleted")
        except (LeftAloneError, OSError) as error:
            print(f"{cache.name}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


def _agreed() -> bool:
    if not sys.stdin.isatty():
        print("There is nobody to ask. Add --yes to delete without asking.", file=sys.stderr)
        return False
    return input("Delete this? [y/N] ").strip().lower() in ("y", "yes")


def add_cache(commands: Any, pack: Path) -> None:
    """Add `cache show|clear` to the parser's commands. `pack` is this pack's folder."""
    about = "what the pack and Triton keep on disk, and deleting it"
    parser = commands.add_parser("cache", help=about, description=about)
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|clear")
    show = actions.add_parser("show", help="sizes and places")
    clear = actions.add_parser("clear", help="delete them, all three or those that are named; asks first")
    clear.add_argument("--triton", action="store_true", help="kernels that Triton compiled")
    clear.add_argument("--verdicts", action="store_true", help="what packages and kernels did when they were tried")
    clear.add_argument("--timings", action="store_true", help="measured speeds")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    for action, run in ((show, _show), (clear, _clear)):
        action.set_defaults(run=run, pack=pack)
