"""Prove kernels in child processes, a few at a time, and keep the verdicts on disk.

A child that crashes, hangs, takes all memory or loses its GPU context changes nothing for the others or for us.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..attention.kernel import Kernel, machine_reasons
from ..attention.machine import Device, Machine
from .import_probe import MEMORY, Child, alone, how_ended, memory_now, over
from .kernel_verdict import KernelVerdict
from .packages import Installed, digest, environment, find, metadata_names, search_path
from .store import Store
from .trials import machine_as_json
from .verdict import short

CHILD = Path(__file__).with_name("kernel_child.py")
LIMIT = 300.0  # seconds for one kernel: Triton and CuTe compile a kernel for every new shape
PATIENCE = 100.0  # seconds without a step forward after which a child counts as hung
START = 120.0  # seconds until the package's import begins: torch is imported and the GPU made ready, on slow disks too
KEPT = 8  # verdicts per kernel: several GPUs and Pythons may share one user folder
CHECKS = 2  # raise it when the trials change, so that everything is proved again

Verdicts = dict[str, dict[str, KernelVerdict]]  # kernel → fingerprint → verdict, oldest first


class _Trying(Child):
    """One kernel being proved; reads its output, counts its memory and ends it as the import probe's child does."""

    def __init__(self, name: str, folder: Path, request: dict[str, Any]):
        self.name, self.started = name, time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix=name, dir=folder))  # the same kernel may have to be tried twice
        self.result = folder / "result"
        self.known: set[Any] = set()
        self.tail, self.ended_by = bytearray(), ""
        self.moved, self.size = self.started, 0
        file = folder / "request.json"
        file.write_text(json.dumps({**request, "kernel": name, "result": str(self.result)}), "utf-8")
        # -B: nothing is written into anybody's folders.
        command = [sys.executable, "-B", "-X", "faulthandler", "-X", "utf8", str(CHILD), str(file)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, **alone()
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def why_end(self, limit: float, patience: float, allowed: int, memory: int) -> str:
        """Why this child has to be ended now; "" while it may go on. allowed, memory: as for over()."""
        now = time.monotonic()
        try:
            size = self.result.stat().st_size
        except OSError:
            size = 0
        if size != self.size:
            self.moved, self.size = now, size
        if why := over(self.memory(), allowed, memory):
            return why
        if now - self.moved > (patience if self.size else max(patience, START)):
            return f"time: did not come to an end within {now - self.moved:.0f} seconds"
        return f"time: was not done within {limit:.0f} seconds" if now - self.started > limit else ""

    def outcome(self) -> KernelVerdict:
        said: dict[str, Any] = {}
        try:
            for line in self.result.read_text("utf-8", "replace").splitlines():
                said.update(json.loads(line))
        except (OSError, ValueError):
            pass
        step = said.pop("step", "")
        raw = bytes(self.tail).decode("utf-8", "replace").strip()
        if "outcome" in said:
            found = KernelVerdict.from_json({"raw": raw if said["outcome"] != "works" else "", **said})
            if found.outcome in ("cannot import", "unsupported") and (short(found.raw) or short(found.detail)):
                return replace(found, outcome="undecided")
            return found
        why, _, what = self.ended_by.partition(": ")
        code = self.process.returncode
        where = f", {step}" if step else ", before it was imported"
        if why.endswith("memory"):
            return KernelVerdict("crashed" if why == "memory" else "undecided", what + where, raw)
        if why == "time":
            return KernelVerdict("hung" if step else "undecided", what + where, raw)
        if why or not step or (os.name != "nt" and code == -signal.SIGKILL):
            detail = why or f"{how_ended(code)}{where}; was it ended from outside, or was memory short?"
            return KernelVerdict("undecided", detail, raw)
        return KernelVerdict("crashed", how_ended(code) + where, raw)


def without_trying(kernel: Kernel, machine: Machine, device: Device) -> KernelVerdict | None:
    """The verdict that the machine's description decides by itself; None where the kernel has to be tried."""
    reasons = machine_reasons(kernel, machine, device)
    if not reasons:
        return None
    missing = kernel.package not in ("", "torch", *machine.packages) and kernel.name not in machine.fetched
    return KernelVerdict("not installed" if missing else "unsupported", "; ".join(reasons), reasons=reasons)


def probe(
    kernels: Iterable[Kernel],
    machine: Machine,
    pack: Path,
    device: Device | None = None,
    *,
    tensors: str = "",
    at_once: int = 0,
    limit: float = LIMIT,
    patience: float = PATIENCE,
    memory: int = MEMORY,
    told: Callable[[str, KernelVerdict], None] = lambda _name, _verdict: None,
    hold: Callable[[str], bool] = lambda _name: False,
) -> dict[str, KernelVerdict]:
    """Prove `kernels` on `device` (the machine's main one). Blocks until all have their verdict; leaves no process.

    pack: the pack's folder. tensors: where the children make tensors, if not on `device`: a test pretends a GPU.
    told: called with each verdict as it comes. hold: asked all the time about each kernel without a verdict; while it
    says True (a prompt runs) no child tries that kernel, and one that does is ended, to begin anew later. What it
    raises ends the probe and its children.
    """
    device = device or machine.main_device
    allowed = memory_now(memory)
    at_once = at_once or max(1, min(3, (os.cpu_count() or 2) // 2))
    verdicts: dict[str, KernelVerdict] = {}

    def settle(name: str, verdict: KernelVerdict) -> None:
        verdicts[name] = verdict
        told(name, verdict)

    waiting = []
    for kernel in kernels:
        if (known := without_trying(kernel, machine, device)) is not None:
            settle(kernel.name, known)
        else:
            waiting.append(kernel.name)
    request = {
        "pack": str(pack),
        "machine": machine_as_json(machine),
        "device": device.name,
        "tensors": tensors or device.name,
        "path": search_path(),
        "limit": limit + 30,
        "parent": os.getpid(),
    }
    running: list[_Trying] = []
    with tempfile.TemporaryDirectory(prefix="attune-", ignore_cleanup_errors=True) as folder:
        try:
            while waiting or running:
                for child in [child for child in running if hold(child.name)]:
                    child.end("it has to wait")
                    running.remove(child)
                    waiting.insert(0, child.name)
                name = next((name for name in waiting if not hold(name)), "") if len(running) < at_once else ""
                if name:
                    waiting.remove(name)
                    try:
                        running.append(_Trying(name, Path(folder), request))
                    except OSError as error:
                        settle(name, KernelVerdict("undecided", f"no child process could be started ({error})"))
                    continue
                time.sleep(0.05)
                for child in list(running):
                    if why := child.why_end(limit, patience, allowed, memory):
                        child.end(why)
                    if not child.running():
                        child.end()  # What it started may still be there.
                        running.remove(child)
                        settle(child.name, child.outcome())
        finally:
            for child in running:
                child.end("the probe was stopped")
    return verdicts


def use_choices(
    kernels: Mapping[str, Kernel], machine: Machine, device: Device, verdicts: Mapping[str, KernelVerdict]
) -> None:
    """Tell kernels which configurations were the fastest on `device`, for it and its equals.

    To be called before anybody hears that they work: a run keeps to one configuration from its beginning to its end.
    """
    for name, verdict in verdicts.items():
        kernel = kernels.get(name)
        if verdict.choice and kernel is not None and kernel.tuning is not None:
            for other in machine.devices:
                if other.like(device):
                    kernel.tuning.use(other.name, verdict.choice)


def fingerprint(
    kernel: Kernel,
    machine: Machine,
    device: Device,
    around: str,
    metadata: list[str],
    found: dict[str, Installed | None] | None = None,
) -> str:
    """The key of a verdict: the GPU, driver, torch, everything installed, and the kernel's package with its files.

    around, metadata: packages.environment() and packages.metadata_names(), which are the same for all kernels. found:
    the packages that other kernels share, filled here. Of torch, a large one, the version has to do.
    """
    package, found = kernel.package.partition(".")[0], {} if found is None else found
    if package not in ("", "torch") and package not in found:
        found[package] = find(package, metadata)
    files = found.get(package)
    version = machine.packages.get(kernel.package), machine.fetched.get(kernel.name)
    gpu = (device.title, device.architecture.name, device.capability, device.gfx, device.memory)
    driver = machine.driver if device.type != "cpu" else ""
    built = machine.torch, machine.cuda, machine.triton
    return digest([CHECKS, kernel.name, kernel.origin, gpu, driver, *built, version, files, around])


def _parse(data: Any) -> Verdicts:
    kept = (data or {}).items()
    return {
        str(name): {str(key): KernelVerdict.from_json(value) for key, value in those.items()} for name, those in kept
    }


def _dump(state: Verdicts) -> dict[str, Any]:
    return {name: {key: verdict.as_json() for key, verdict in those.items()} for name, those in state.items()}


def store(folder: Path) -> Store:
    """The file of verdicts in the folder that doctor.store.home() gave."""
    return Store(folder / "verdicts.json", "attune verdicts", 1, _parse, _dump)


def stored(
    kernels: Iterable[Kernel], machine: Machine, folder: Path, device: Device | None = None
) -> tuple[dict[str, KernelVerdict], dict[str, str]]:
    """(verdicts that hold here and now, fingerprints of the kernels that have to be tried). Starts nothing."""
    device = device or machine.main_device
    metadata = metadata_names()
    around, known = environment(metadata), store(folder).read()
    verdicts, open_ones = {}, {}
    found: dict[str, Installed | None] = {}
    for kernel in kernels:
        verdict = without_trying(kernel, machine, device)
        if verdict is None:
            key = fingerprint(kernel, machine, device, around, metadata, found)
            verdict = known.get(kernel.name, {}).get(key)
            if verdict is None:
                open_ones[kernel.name] = key
        if verdict is not None:
            verdicts[kernel.name] = verdict
    return verdicts, open_ones


def examine(
    kernels: Iterable[Kernel],
    machine: Machine,
    pack: Path,
    folder: Path,
    device: Device | None = None,
    *,
    again: bool = False,
    **options: Any,
) -> dict[str, KernelVerdict]:
    """A verdict for each of `kernels`: kept ones where nothing has changed, else new ones, which are kept.

    again: prove everything anew. options: those of probe().
    """
    kernels = list(kernels)
    if again:
        store(folder).update(lambda state: [state.pop(kernel.name, None) for kernel in kernels])
    verdicts, keys = stored(kernels, machine, folder, device)
    if keys:
        told: Callable[[str, KernelVerdict], None] = options.pop("told", lambda _name, _verdict: None)

        def keep(name: str, verdict: KernelVerdict) -> None:
            def add(state: Verdicts) -> None:
                kept = state.setdefault(name, {})
                kept[keys[name]] = verdict
                for old in list(kept)[:-KEPT]:
                    del kept[old]

            if verdict.lasting:
                store(folder).update(add)
            told(name, verdict)

        open_ones = [kernel for kernel in kernels if kernel.name in keys]
        verdicts.update(probe(open_ones, machine, pack, device, told=keep, **options))
    return {kernel.name: verdicts[kernel.name] for kernel in kernels}
