"""Keep packages out of this process that would end it: they are made to look as if they were not installed.

`import`, `importlib.util.find_spec` and `importlib.metadata` agree then that the package is not there, and ComfyUI,
diffusers and other packs do what they were written to do without it. Nothing on disk is changed. Standard library only:
prestartup_script.py runs this before torch is imported. ATTUNE_QUARANTINE=off, or ATTUNE=off, turns it off.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from .packages import WATCHED, Installed, environment, find, fingerprint, metadata_names, normal
from .store import Store, home
from .verdict import Verdict

log = logging.getLogger("attune")
KEPT = 8  # verdicts per package: several Pythons may share one user folder


@dataclass
class State:
    """What is on disk: `verdicts` by package and fingerprint, oldest first; `added` on request; `lifted` on request.

    `lifted` holds fingerprints: a package that was changed since is judged anew.
    """

    verdicts: dict[str, dict[str, Verdict]] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    lifted: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, data: Any) -> State:
        """Raises ValueError, TypeError, KeyError or AttributeError when the data are not a state."""
        if data is None:
            return cls()
        verdicts = {
            str(name): {str(key): Verdict.from_json(value) for key, value in kept.items()}
            for name, kept in data["verdicts"].items()
        }
        return cls(verdicts, [str(name) for name in data["added"]], [str(key) for key in data["lifted"]])

    def dump(self) -> dict[str, Any]:
        verdicts = {
            name: {key: verdict.as_json() for key, verdict in kept.items()} for name, kept in self.verdicts.items()
        }
        return {"verdicts": verdicts, "added": self.added, "lifted": self.lifted}

    def keep(self, name: str, key: str, verdict: Verdict) -> None:
        """Store a verdict as the newest of its package."""
        kept = self.verdicts.setdefault(name, {})
        kept.pop(key, None)
        kept[key] = verdict
        for old in list(kept)[:-KEPT]:
            del kept[old]
        known = {key for verdicts in self.verdicts.values() for key in verdicts}
        self.lifted = [key for key in self.lifted if key in known]


def store(folder: Path) -> Store:
    """The quarantine's file in the folder that doctor.store.home() gave."""
    return Store(folder / "quarantine.json", "attune quarantine", 1, State.parse, State.dump)


def off() -> bool:
    """Whether the environment turns the quarantine, or the whole pack, off."""
    values = (os.environ.get(name, "").strip().lower() for name in ("ATTUNE", "ATTUNE_QUARANTINE"))
    return any(value in ("off", "0", "false", "no") for value in values)


# What is hidden in this process


_hidden: dict[str, tuple[str, ...]] = {}  # import name → normalized names of its distributions
_find_distributions = PathFinder.__dict__["find_distributions"]


def _without_hidden(*arguments: Any, **keywords: Any) -> Iterator[Any]:
    names = {name for names in _hidden.values() for name in names}
    for distribution in _find_distributions.__get__(None, PathFinder)(*arguments, **keywords):
        folder = getattr(getattr(distribution, "_path", None), "name", "")  # reading the metadata of all takes long
        name = folder.partition("-")[0] if "-" in folder else distribution.metadata["Name"]
        if normal(name or "") not in names:
            yield distribution


def hide(name: str) -> None:
    """Make the watched package `name` look as if it were not installed, for the rest of this process.

    `sys.modules[name] = None` makes `import name` and `import name.part` raise ModuleNotFoundError and find_spec say
    None; a finder that raises, or an empty module, would break or mislead diffusers and transformers.
    """
    sys.modules[name] = None  # type: ignore[assignment]
    _hidden[name] = tuple(normal(distribution) for distribution in WATCHED[name].distributions)
    PathFinder.find_distributions = staticmethod(_without_hidden)


def release(name: str) -> None:
    """Undo hide()."""
    if _hidden.pop(name, None) is not None:
        sys.modules.pop(name, None)
    if not _hidden:
        PathFinder.find_distributions = _find_distributions


# What is to be hidden


@dataclass(frozen=True)
class Finding:
    """What to do about one package: `hidden`, and why; `stops_host`: the launch flag would end the host."""

    name: str
    title: str
    hidden: bool
    reason: str
    stops_host: bool


def _stored(installed: dict[str, Installed], state: State, around: str) -> tuple[dict[str, Verdict], set[str]]:
    """The stored verdicts that hold here and now, and the packages that are hidden because of them or on request."""
    found, kept_away = {}, set(state.added).intersection(WATCHED)
    for name, package in installed.items():
        key = fingerprint(package, around)
        verdict = state.verdicts.get(name, {}).get(key)
        if verdict is not None:
            found[name] = verdict
            if verdict.harmful and key not in state.lifted:
                kept_away.add(name)
    return {name: verdict for name, verdict in found.items() if set(verdict.hidden) <= kept_away}, kept_away


def _probe(packages: list[Installed], hidden: tuple[str, ...]) -> dict[str, Verdict]:
    """Verdicts of children, announced by one line."""
    from .import_probe import LIMIT, PATIENCE, probe

    log.info(
        "Attune: importing %s in child processes, because they are new or something they depend on has changed "
        "(at most %.0f seconds, once).",
        ", ".join(map(str, packages)),
        LIMIT,
    )
    names, started = [package.name for package in packages], time.monotonic()
    verdicts = probe(names, hide=hidden)
    # Others import flash_attn where it is there: they may be fine once it is not.
    again = [name for name in names if name != "flash_attn" and verdicts[name].harmful]
    left = LIMIT - (time.monotonic() - started)
    if again and left > PATIENCE and "flash_attn" in verdicts and verdicts["flash_attn"].harmful:
        second = probe(again, (*hidden, "flash_attn"), left)
        verdicts |= {name: verdict for name, verdict in second.items() if verdict.outcome in ("works", "cannot import")}
    return verdicts


def examine(file: Store, names: Iterable[str] = WATCHED) -> list[Finding]:
    """Judge the packages `names`: from stored verdicts, and where there is none for things as they are, from children.

    Writes new verdicts to `file`. Takes a few milliseconds where nothing has changed and up to 20 seconds otherwise.
    """
    state: State = file.read()
    metadata = metadata_names()
    installed = {name: package for name in names if (package := find(name, metadata)) is not None}
    around = environment(metadata) if installed else ""
    verdicts, kept_away = _stored(installed, state, around)
    new = [package for name, package in installed.items() if name not in verdicts and name not in state.added]
    if new:
        fresh = _probe(new, tuple(sorted(kept_away)))
        lasting = {name: verdict for name, verdict in fresh.items() if verdict.outcome not in ("undecided", "unknown")}
        _say_what_is_better(lasting, state, installed)

        def keep(state: State) -> None:
            for name, verdict in lasting.items():
                state.keep(name, fingerprint(installed[name], around), verdict)

        file.update(keep)
        verdicts.update(fresh)
        for name, verdict in fresh.items():
            if verdict.outcome == "unknown":
                log.warning("Attune: %s could not be judged: %s.", installed[name], verdict.detail)
    findings = []
    for name in names:
        verdict = verdicts.get(name)
        title = str(installed.get(name, name))
        if name in state.added:
            findings.append(Finding(name, title, True, "this was asked for with `attune quarantine add`", True))
        elif verdict is not None:
            lifted = fingerprint(installed[name], around) in state.lifted
            hidden = (verdict.harmful or verdict.outcome == "undecided") and not lifted
            stops = hidden or (verdict.outcome == "cannot import" and not lifted)
            findings.append(Finding(name, title, hidden, reason(verdict), stops))
    return findings


def reason(verdict: Verdict) -> str:
    """One sentence, without a full stop, that says what importing the package did."""
    if verdict.outcome in ("raises", "cannot import"):
        return f"importing it in a child process raised {verdict.detail.partition(chr(10))[0].rstrip('.')}"
    if verdict.outcome == "undecided":
        return f"importing it in a child process {verdict.detail}; it is tried again at the next start"
    return f"importing it in a child process {verdict.detail}"


def _say_what_is_better(fresh: dict[str, Verdict], state: State, installed: dict[str, Installed]) -> None:
    for name, verdict in fresh.items():
        before = list(state.verdicts.get(name, {}).values())
        if before and before[-1].harmful and not verdict.harmful:
            log.info("Attune: %s can be imported again and has left quarantine.", installed[name])


_applied = False


def applied() -> bool:
    """Has this process been through `apply`?"""
    return _applied


def apply(pack: Path) -> None:
    """What prestartup_script.py does: judge, hide, clear launch flags, and say so. Never raises.

    pack: the pack's folder as ComfyUI sees it, for the command that the log shows.
    """
    global _applied
    _applied = True
    if off():
        return
    try:
        folder = home()
        args = getattr(sys.modules.get("comfy.cli_args"), "args", None)
        for finding in examine(store(folder), [name for name in WATCHED if sys.modules.get(name) is None]):
            _enforce(finding, args, f'python "{pack}" quarantine remove {finding.name} --home "{folder}"')
    except Exception:
        log.warning("Attune: the quarantine of attention packages could not be applied; going on.", exc_info=True)


def _enforce(finding: Finding, args: Any, lift: str) -> None:
    flag = WATCHED[finding.name].flag
    cleared = bool(flag) and finding.stops_host and getattr(args, flag, False)
    option = f"--{flag.replace('_', '-')}"
    if cleared:
        setattr(args, flag, False)
    if finding.hidden:
        hide(finding.name)
        log.warning(
            "Attune: %s is in quarantine, to %s it is not installed: %s. %sNothing on disk was changed. "
            "To lift it: %s (or ATTUNE_QUARANTINE=off for all).",
            finding.title,
            "this program" if args is None else "ComfyUI",
            finding.reason,
            f"The flag {option} was cleared. " if cleared else "",
            lift,
        )
    elif cleared:
        log.warning(
            "Attune: the flag %s was cleared, ComfyUI would have stopped: %s is installed but %s. "
            "Repair or reinstall it (ATTUNE_QUARANTINE=off leaves the flag alone).",
            option,
            finding.title,
            finding.reason,
        )
