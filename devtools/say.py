"""What dev.py says: steps, notes, progress bars, and the one sentence it stops with."""

import shutil
import sys
import time


class Stop(Exception):
    """dev.py cannot go on; the text is one sentence for the user that says what to do."""


def step(text):
    """Say what is being done now."""
    print(f"==> {text}", flush=True)


def note(text=""):
    """Print one indented line, or an empty one."""
    print(f"    {text}".rstrip(), flush=True)


class Bar:
    """A progress bar on a terminal; elsewhere a line whenever another tenth is done or 20 seconds have passed."""

    WIDTH = 20
    QUIET_SECONDS = 20

    def __init__(self, label, out=None):
        self.label = label
        self.out = out or sys.stdout
        self.live = self.out.isatty()
        self._tenth = -1
        self._said = time.monotonic()
        self._open = False

    def show(self, done, total, unit=""):
        """Show `done` of `total`, both in `unit` (empty: plain counts)."""
        share = min(1.0, done / total) if total else 0.0
        if self.live:
            full = round(share * self.WIDTH)
            bar = "#" * full + "-" * (self.WIDTH - full)
            line = f"    [{bar}] {share:4.0%} {self.label[:46]:<46} {done:.0f}/{total:.0f} {unit}"
            width = shutil.get_terminal_size().columns - 1
            self.out.write("\r" + line[:width].ljust(width))
            self._open = True
        elif int(share * 10) != self._tenth or time.monotonic() - self._said > self.QUIET_SECONDS:
            self._tenth, self._said = int(share * 10), time.monotonic()
            self.out.write(f"    {share:4.0%}  {self.label}, {done:.0f} of {total:.0f} {unit}".rstrip() + "\n")
        self.out.flush()

    def close(self):
        """End the line, so that the next print starts a new one."""
        if self._open:
            self.out.write("\n")
            self.out.flush()
            self._open = False
