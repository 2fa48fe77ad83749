"""Import packages in child processes, all at once and for a limited time, and tell what became of each.

Standard library; psutil, which ComfyUI brings, where it is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .packages import search_path
from .verdict import Verdict, short

try:
    import psutil
except ImportError:
    psutil = None

CHILD = Path(__file__).with_name("import_child.py")
LIMIT = 20.0  # seconds for all children together
PATIENCE = 5.0  # seconds that a package may take at least before it counts as hung
# Bytes that a child and what it started may hold, and may in any case: torch with CUDA and a package need 1 to 3 GiB.
MEMORY, LEAST_MEMORY = 8 << 30, 3 << 30
# Source: Microsoft, [MS-ERREF] 2.3.1 NTSTATUS values.
_NTSTATUS = {
    0xC0000005: "access violation",
    0xC00000FD: "stack overflow",
    0xC0000135: "a DLL was not found",
    0xC0000409: "stack buffer overrun, or abort()",
}


def alone() -> dict[str, Any]:
    """Arguments of Popen that give a child a process group of its own and no window. The POSIX part is in _kill."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _kill(process: subprocess.Popen, known: Iterable[Any]) -> None:
    """End a child and everything it started. `known` are its descendants as psutil saw them."""
    if os.name != "nt":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for descendant in known:
        with contextlib.suppress(psutil.Error):
            descendant.kill()
    if process.poll() is None:
        with contextlib.suppress(OSError):
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def how_ended(code: int) -> str:
    """An exit status in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended that process with signal {-code} ({signal.Signals(-code).name})"
    if (code & 0xFFFFFFFF) in _NTSTATUS:
        return f"ended that process with 0x{code & 0xFFFFFFFF:08X} ({_NTSTATUS[code & 0xFFFFFFFF]})"
    return f"ended that process with exit code {code}"


def memory_now(memory: int) -> int:
    """Bytes that a child may hold at this moment: `memory`, or less where little is free."""
    return memory if psutil is None else min(memory, max(psutil.virtual_memory().available // 2, LEAST_MEMORY))


def over(held: int, allowed: int, memory: int) -> str:
    """Why a child that holds `held` bytes has to be ended, after what is at fault; "" where it has not.

    "memory: …" where it took all that one may ever take (`memory`), "free memory: …" where little was free.
    """
    if held <= allowed:
        return ""
    what = f"took {held / 2**30:.1f} GiB of memory, over the limit of {allowed / 2**30:.1f}"
    return f"memory: {what}" if allowed >= memory else f"free memory: {what}, as little was free"


class Child:
    """One import under way. Its output is read all the time, and only the end is kept."""

    def __init__(self, package: str, folder: Path, hide: tuple[str, ...], limit: float):
        self.package, self.hide, self.started = package, hide, time.monotonic()
        self.result = folder / f"{package}.result"
        self.known: set[Any] = set()
        self.tail, self.ended_by = bytearray(), ""
        request = folder / f"{package}.json"
        data = {"package": package, "path": search_path(), "hide": hide, "limit": limit + 5, "result": str(self.result)}
        request.write_text(json.dumps(data), "utf-8")
        # -B: nothing is written into the package's folders.
        command = [sys.executable, "-B", "-X", "faulthandler", "-X", "utf8", str(CHILD), str(request)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, **alone()
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self.process.stdout.fileno(), 65536):
                self.tail += chunk
                del self.tail[:-4000]

    def running(self) -> bool:
        return self.process.poll() is None

    def memory(self) -> int:
        """Bytes that the child and its descendants hold now; 0 where psutil is not installed."""
        if psutil is None:
            return 0
        held = 0
        with contextlib.suppress(psutil.Error):
            child = psutil.Process(self.process.pid)
            self.known.update(child.children(recursive=True))
            for process in (child, *self.known):
                with contextlib.suppress(psutil.Error):
                    held += process.memory_info().rss
        return held

    def end(self, reason: str = "") -> None:
        """Kill what is left of it; `reason`: why it had to be."""
        if self.running() and not self.ended_by:
            self.ended_by = reason
        _kill(self.process, self.known)
        self.reader.join(timeout=2)
        if not self.reader.is_alive():
            self.process.stdout.close()

    def verdict(self, limit: float, patience: float) -> Verdict:
        said: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            for line in self.result.read_text("utf-8", "replace").splitlines():
                with contextlib.suppress(ValueError):
                    said.update(json.loads(line))
        raw = bytes(self.tail).decode("utf-8", "replace").strip()
        waited, code = said.pop("torch", None), self.process.returncode
        if "outcome" in said:
            found = Verdict.from_json({"raw": raw, **said, "hidden": self.hide})
            if found.outcome != "works" and (short(found.raw) or short(found.detail)):
                return Verdict("undecided", f"raised {found.detail.partition(chr(10))[0].rstrip('.')}", found.raw)
            return found
        why, _, what = self.ended_by.partition(": ")
        if what:
            return Verdict("crashed" if why == "memory" else "undecided", what, raw, hidden=self.hide)
        if self.ended_by and waited is not None and limit - waited > max(patience, waited):
            return Verdict("hung", f"did not end within {limit - waited:.0f} seconds", raw, hidden=self.hide)
        if self.ended_by:
            return Verdict("undecided", f"was not done within {limit:.0f} seconds", raw)
        if waited is None:
            return Verdict("unknown", f"torch was not there yet when its child {how_ended(code)}", raw)
        if os.name != "nt" and code == -signal.SIGKILL:
            return Verdict("undecided", "was killed from outside (out of memory?)", raw)
        return Verdict("crashed", how_ended(code), raw, hidden=self.hide)


def probe(
    packages: Iterable[str],
    hide: tuple[str, ...] = (),
    limit: float = LIMIT,
    patience: float = PATIENCE,
    memory: int = MEMORY,
) -> dict[str, Verdict]:
    """Import each of `packages` in a child of its own, all at the same time. Ends after `limit` seconds at the latest.

    A package that is still being imported then is "hung" if it had `patience` seconds and longer than torch took
    before it; else the machine is slow and it is "undecided". Leaves no process and no file behind.
    """
    allowed = memory_now(memory)
    verdicts: dict[str, Verdict] = {}
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="attune-", ignore_cleanup_errors=True) as folder:
        try:
            for package in packages:
                try:
                    children.append(Child(package, Path(folder), hide, limit))
                except OSError as error:
                    verdicts[package] = Verdict("unknown", f"no child process could be started ({error})")
            deadline = time.monotonic() + limit
            while (running := [child for child in children if child.running()]) and time.monotonic() < deadline:
                for child in running:
                    if why := over(child.memory(), allowed, memory):
                        child.end(why)
                time.sleep(0.05)
        finally:
            for child in children:
                child.end("time")
        verdicts.update({child.package: child.verdict(limit, patience) for child in children})
    return verdicts
