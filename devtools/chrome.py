"""Find an installed Chrome or Chromium, or install Debian's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .say import Stop, note, step

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome", "msedge")
PLACES = (
    ("PROGRAMFILES", "Google/Chrome/Application/chrome.exe"),
    ("PROGRAMFILES(X86)", "Google/Chrome/Application/chrome.exe"),
    ("LOCALAPPDATA", "Google/Chrome/Application/chrome.exe"),
    ("PROGRAMFILES(X86)", "Microsoft/Edge/Application/msedge.exe"),
)
MACOS = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
MISSING = (
    "no Chrome or Chromium was found; `python3 dev.py test --browser` installs Debian's "
    "(it runs `apt-get install -y chromium`), or set CHROME to the path of one"
)


def find():
    """Path of an installed browser as a string, or None. The environment variable CHROME wins."""
    if given := os.environ.get("CHROME"):
        return given if Path(given).is_file() else None
    for name in NAMES:
        if found := shutil.which(name):
            return found
    for variable, rest in PLACES:
        if (base := os.environ.get(variable)) and (Path(base) / rest).is_file():
            return str(Path(base) / rest)
    return str(MACOS) if MACOS.is_file() else None


def install() -> None:
    """Install Debian's chromium when no browser is there. Raises Stop where that is not possible."""
    if find():
        return
    if not shutil.which("apt-get"):
        raise Stop("There is no apt-get here to install chromium with: install Chrome or Chromium and run this again.")
    step("Installing Debian's chromium (about 300 MB)")
    before = [] if _is_administrator() else ["sudo", "-n"]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "fonts-liberation"]):
        command = [*before, "apt-get", *arguments]
        note(" ".join(command))
        try:
            done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        except OSError as error:
            raise Stop(f"`{' '.join(command)}` could not be started ({error}): run it as an administrator.") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise Stop(f"`{' '.join(command)}` failed: {last}")
    if not find():
        raise Stop("apt-get installed chromium, but no browser is on the PATH: set CHROME to the path of one.")


def _is_administrator() -> bool:
    # The one place here that is POSIX only; apt-get exists nowhere else.
    return sys.platform != "win32" and os.geteuid() == 0
