"""What the doctor's probe says of each kernel on this machine, while ComfyUI runs.

One background thread reads the kept verdicts, and tries what is open in child processes, never while a prompt runs. A
kernel without the verdict "works" is not called in this process; a run whose node names one that is still open waits.
Plain PyTorch (`Kernel.needs_proof` False) may be called until it has a verdict.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..attention.kernel import Kernel, machine_reasons
from ..attention.machine import Device, Machine
from ..attention.plan import HOST
from ..attention.policy import FAMILIES
from ..attention.session import Session
from ..doctor.kernel_verdict import KernelVerdict
from ..doctor.probe import examine, stored, use_choices

log = logging.getLogger("attune")
OPEN = "is being tried in a child process first, or waits for that; later runs can use it"
# Whose kernels the host's own function calls, by its name.
_HOSTS = {"sage": FAMILIES["sage"], "flash": ("flash2",), "xformers": ("xformers", "xformers_cutlass")}
_AGAIN = 600.0  # seconds before a kernel whose probe was disturbed is tried again
_FIRST_LOOK = 60.0  # seconds; reading the kept verdicts takes a fraction of one


class _Ended(Exception):
    """ComfyUI ends, and with it the probe."""


class _SomethingElse(Exception):
    """A run waits for a kernel that is not among those being tried."""


class Verdicts:
    """The verdicts on `kernels`, filled in the background once somebody asks.

    kernels: those of the pack, which the child processes know too. pack: the pack's folder. folder: where verdicts are
    kept. busy: does a prompt run now?
    """

    def __init__(
        self,
        kernels: Iterable[Kernel],
        machine: Callable[[], Machine],
        pack: Path,
        folder: Path,
        busy: Callable[[], bool],
    ) -> None:
        self._kernels = {kernel.name: kernel for kernel in kernels}
        self._read_machine, self._pack, self._folder, self._busy = machine, pack, folder, busy
        self._news = threading.Condition()
        self._known: dict[Device, dict[str, KernelVerdict]] = {}
        self._open: dict[Device, list[str]] = {}
        self._wanted: set[tuple[Device, str]] = set()  # what a run waits for
        self._looked, self._ending = threading.Event(), threading.Event()  # looked: the kept verdicts have been read
        self._thread: threading.Thread | None = None
        self._warned = False
        self._tried: dict[tuple[Device, str], float] = {}  # when a disturbed probe was done again
        self._told: weakref.WeakSet[Session] = weakref.WeakSet()

    def start(self) -> None:
        """Begin in the background. Does nothing the second time."""
        with self._news:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="attune-probe", daemon=True)
                self._thread.start()
                atexit.register(self.stop)

    def stop(self) -> None:
        """End the children and the thread."""
        self._ending.set()
        with self._news:
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def tell(self, session: Session) -> None:
        """Have a session that outlives single runs ask again whenever a verdict comes in."""
        with self._news:
            self._told.add(session)

    def _like(self, device: str) -> Device:
        """The device whose verdicts count for this one: equal cards share them."""
        here = self._read_machine().device(device)
        with self._news:
            return next((known for known in self._known if known.like(here)), here)

    def known(self, device: str) -> dict[str, KernelVerdict]:
        """The verdicts on this device so far, by kernel."""
        self.start()
        self._looked.wait(_FIRST_LOOK)
        with self._news:
            return dict(self._known.get(self._like(device), {}))

    def open(self, device: str) -> list[str]:
        """The kernels whose verdict on this device is still to come."""
        known = self.known(device)
        return [name for name in self._kernels if name not in known]

    def outcomes(self) -> dict[str, str]:
        """Kernel name → outcome on the main device, "open" where it is still to come."""
        known = self.known(self._read_machine().main_device.name)
        return {name: known[name].outcome if name in known else "open" for name in self._kernels}

    def refused(self, device: str) -> dict[str, str]:
        """Kernel name → why it may not be called on this device now; without those that the machine refuses."""
        waiting = [name for name in self.open(device) if self._kernels[name].needs_proof]
        return {**self.condemned(device), **dict.fromkeys(waiting, OPEN)}

    def condemned(self, device: str) -> dict[str, str]:
        """`refused`, without the kernels whose verdict is still to come."""
        known = self.known(device)
        found = {
            name: f"the doctor found: {verdict.outcome} ({verdict.detail or 'no detail'}); see `attune doctor`"
            for name, verdict in known.items()
            if not verdict.works and not verdict.reasons
        }
        # The host may itself compute with one of them: with the first of its family that this machine takes.
        family = _HOSTS.get(self._read_machine().host_attention, ())
        name = next((name for name in family if name in known and not known[name].reasons), "")
        if name in found:
            found[HOST] = f"ComfyUI's own attention is {name} here, and {found[name]}"
        return found

    def wait(
        self,
        names: Iterable[str],
        device: str,
        say: Callable[[str], None] = lambda _name: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Block until the first of `names` that works has its verdict, or all have.

        say: called with each name that is really waited for. check: called all the time; what it raises ends the wait.
        A probe that was disturbed is tried again, at most every ten minutes.
        """
        self.start()
        self._looked.wait(_FIRST_LOOK)
        here = self._like(device)
        for name in names:
            kernel = self._kernels.get(name)
            if kernel is None or machine_reasons(kernel, self._read_machine(), here):
                continue
            if not kernel.needs_proof and name not in self.condemned(device):
                return
            self._wait_for(here, [name], say, check)
            verdict = self._verdict(here, name)
            if verdict is not None and verdict.works:
                return

    def settle(
        self, device: str, say: Callable[[str], None] = lambda _name: None, check: Callable[[], None] = lambda: None
    ) -> dict[str, KernelVerdict]:
        """The verdict on every kernel; waits for those that are still to come. say, check: as for `wait`."""
        self.known(device)
        self._wait_for(self._like(device), list(self._kernels), say, check)
        return self.known(device)

    def _wait_for(
        self, device: Device, names: list[str], say: Callable[[str], None], check: Callable[[], None]
    ) -> None:
        with self._news:
            known = self._known.setdefault(device, {})
            for name in names:
                if name in known and known[name].outcome == "undecided" and self._may_try_again(device, name):
                    del known[name]
            missing = [name for name in names if name not in known]
            self._wanted.update((device, name) for name in missing)
            self._news.notify_all()
        try:
            for name in missing:
                say(name)
            while any(self._verdict(device, name) is None for name in missing) and self._alive():
                check()
                with self._news:
                    self._news.wait(0.1)
        finally:
            with self._news:
                self._wanted.difference_update((device, name) for name in missing)

    def _may_try_again(self, device: Device, name: str) -> bool:
        """A disturbed probe is done again, but not in every run: what disturbed it (a full GPU) may last."""
        now = time.monotonic()
        again = now - self._tried.get((device, name), now - _AGAIN) >= _AGAIN
        if again:
            self._tried[device, name] = now
        return again

    def _verdict(self, device: Device, name: str) -> KernelVerdict | None:
        with self._news:
            return self._known.get(device, {}).get(name)

    def _to_be_found(self, device: Device, name: str) -> bool:
        return self._verdict(device, name) is None

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._ending.is_set()

    def _keep(self, device: Device, found: Mapping[str, KernelVerdict]) -> None:
        use_choices(self._kernels, self._read_machine(), device, found)
        with self._news:
            self._known.setdefault(device, {}).update(found)
            self._news.notify_all()
            sessions = list(self._told)
        for session in sessions:
            session.ask_again()

    def _work(self) -> None:
        try:
            self._look()
            while not self._ending.is_set():
                with self._news:
                    device, names = self._next()
                    if device is None:
                        self._news.wait(1)
                if device is not None:
                    self._try(device, names)
        except _Ended:
            pass
        except Exception:
            log.exception("Attune: the probe of the attention kernels failed; kernels without a verdict are not used")
        finally:
            self._looked.set()

    def _next(self) -> tuple[Device | None, list[str]]:
        """What to try now: what a run waits for comes first."""
        for device, _ in self._wanted:
            names = [name for on, name in self._wanted if on == device and name not in self._known.get(on, {})]
            if names:
                return device, names
        for device, names in self._open.items():
            names[:] = [name for name in names if name not in self._known.get(device, {})]
            if names:
                return device, list(names)
        return None, []

    def _look(self) -> None:
        """Read what is known already; the rest is open."""
        machine = self._read_machine()
        distinct: list[Device] = []
        for device in sorted(machine.devices, key=lambda device: device is not machine.main_device):
            if not any(device.like(other) for other in distinct):
                distinct.append(device)
        for device in distinct:  # the main one first
            known, fingerprints = stored(self._kernels.values(), machine, self._folder, device)
            self._keep(device, known)
            with self._news:
                self._open.setdefault(device, []).extend(fingerprints)
        self._looked.set()
        self._warn_of_host(distinct[0])

    def _try(self, device: Device, names: list[str]) -> None:
        def hold(name: str) -> bool:
            if self._ending.is_set():
                raise _Ended
            with self._news:
                wanted = set(self._wanted)
            if any(device != on or other not in names for on, other in wanted if not self._verdict(on, other)):
                raise _SomethingElse
            return (device, name) not in wanted and self._busy()

        log.info("Attune: trying %s on %s in child processes, once in this environment.", ", ".join(names), device.name)
        try:
            found = examine(
                [self._kernels[name] for name in names],
                self._read_machine(),
                self._pack,
                self._folder,
                device,
                told=lambda name, verdict: self._keep(device, {name: verdict}),
                hold=hold,
            )
        except _SomethingElse:
            return
        except _Ended:
            raise
        except Exception as error:  # the probe as a whole (a full disk): nothing is known of these, and others follow
            log.exception("Attune: the probe of %s failed; they are not used", ", ".join(names))
            unknown = KernelVerdict("undecided", f"the probe failed ({type(error).__name__}: {error})")
            found = {name: unknown for name in names if self._to_be_found(device, name)}
        self._keep(device, found)
        said = ", ".join(f"{name} {verdict.outcome}" for name, verdict in found.items())
        log.info("Attune: tried on %s: %s. `attune doctor` says what to do about the others.", device.name, said)
        self._warn_of_host(device)

    def _warn_of_host(self, device: Device) -> None:
        """What no node of ours can mend: the host's own attention, where it is no good."""
        if (why := self.condemned(device.name).get(HOST)) and not self._warned:
            self._warned = True
            flag = self._read_machine().host_flag
            cure = f"Start ComfyUI without {flag}." if flag else "`attune quarantine add` hides a package from it."
            log.warning("Attune: %s. Models without a node of this pack compute with it. %s", why, cure)
