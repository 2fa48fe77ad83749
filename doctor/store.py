"""State on disk: one JSON file with a schema number, written beside and renamed. Standard library only."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger("attune")
State = TypeVar("State")
PATIENCE = 3.0  # seconds that an update waits for another process's; it takes milliseconds
ABANDONED = 10.0  # seconds after which a lock's process is taken to have died


def _cache_folder() -> Path:
    """The folder for caches of this user, as each system has it."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def home(pack: Path | None = None) -> Path:
    """Where the pack keeps its state: ATTUNE_HOME, else attune/ in the host's user folder, else in the user's caches.

    In ComfyUI the host says where its user folder is. Outside, `pack` tells: ComfyUI is what holds custom_nodes/<pack>.
    """
    if given := os.environ.get("ATTUNE_HOME", "").strip():
        return Path(given).expanduser().absolute()
    host = sys.modules.get("folder_paths")
    if host is not None:
        return Path(host.get_user_directory()) / "attune"
    if pack is not None and pack.parent.name == "custom_nodes" and (pack.parent.parent / "user").is_dir():
        return pack.parent.parent / "user" / "attune"
    return _cache_folder() / "attune"


def _patiently(act: Callable[[], Any]) -> Any:
    """`act()`, which Windows refuses for a moment where another process reads or replaces the file right now."""
    for wait in (0.02, 0.1, 0.3):
        try:
            return act()
        except PermissionError:
            time.sleep(wait)
    return act()


class Store:
    """One file. A file that cannot be read, or is not ours, is set aside with a warning and begun anew.

    kind, schema: what the file must say it is. parse: makes the state from the JSON under "state", or from None where
    there is no file; raises ValueError, TypeError, KeyError or AttributeError when that is not one. dump: the reverse.
    """

    def __init__(self, path: Path, kind: str, schema: int, parse: Callable[[Any], State], dump: Callable[[State], Any]):
        self.path, self.kind, self.schema, self.parse, self.dump = path, kind, schema, parse, dump

    def read(self) -> Any:
        """The state; an empty one where there is no file or none that can be read."""
        try:
            data = json.loads(_patiently(lambda: self.path.read_text("utf-8")))
            if not isinstance(data, dict) or (data.get("kind"), data.get("schema")) != (self.kind, self.schema):
                found = {key: data.get(key) for key in ("kind", "schema")} if isinstance(data, dict) else type(data)
                raise ValueError(f"wanted kind {self.kind!r} with schema {self.schema}, found {found}")
            return self.parse(data["state"])
        except FileNotFoundError:
            return self.parse(None)
        except OSError as error:
            log.warning("Attune: %s cannot be read (%s); going on without it.", self.path, error)
            return self.parse(None)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._set_aside(error)
            return self.parse(None)

    def _set_aside(self, error: Exception) -> None:
        aside = self.path.with_name(f"{self.path.name}.unreadable")
        try:
            os.replace(self.path, aside)
            where = f"It was set aside as {aside} and is begun anew"
        except OSError as failed:
            where = f"It could not be set aside ({failed})"
        log.warning("Attune: %s is not a file of this version (%s). %s.", self.path, error, where)

    def update(self, change: Callable[[Any], None]) -> bool:
        """Read, let `change` alter the state in place, write. False, after a warning, when it cannot be written.

        Other processes, and threads, wait meanwhile: a lost verdict would only be asked for again, but the file also
        holds what the user typed (`attune quarantine add`), perhaps while a ComfyUI starts.
        """
        with contextlib.suppress(OSError):  # It comes up again when the file is written.
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            state = self.read()
            change(state)
            text = json.dumps({"kind": self.kind, "schema": self.schema, "state": self.dump(state)}, indent=1)
            try:
                self._write(text)
            except OSError as error:
                said = "Attune: %s cannot be written (%s); set ATTUNE_HOME to a folder that can."
                log.warning(said, self.path, error)
                return False
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock file, or go on without it where it cannot be had: starting ComfyUI never hangs on it.

        Without it, or where two processes break the same abandoned lock, an update may be lost. The file itself is
        renamed into its place and so is whole in any case.
        """
        lock = self.path.with_name(f"{self.path.name}.lock")
        deadline = time.monotonic() + PATIENCE
        held, refused = False, 0
        while not held and refused < 20 and time.monotonic() < deadline:
            try:
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                held = True
            except FileExistsError:
                with contextlib.suppress(OSError):
                    # A time to come is wrong as well: the clock was set, or the folder lies on another machine.
                    if abs(time.time() - lock.stat().st_mtime) > ABANDONED:
                        lock.unlink()
                time.sleep(0.002)
            except PermissionError:  # No right to write; on Windows also a lock that is just being deleted.
                refused += 1
                time.sleep(0.002)
            except OSError:
                break
        try:
            yield
        finally:
            if held:
                with contextlib.suppress(OSError):
                    lock.unlink()

    def _write(self, text: str) -> None:
        handle, name = tempfile.mkstemp(prefix=self.path.name, suffix=".part", dir=self.path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            _patiently(lambda: os.replace(name, self.path))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
