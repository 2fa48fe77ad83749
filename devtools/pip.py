"""pip as a child process with a progress bar, healing of a killed install, and its failures in one sentence."""

import os
import queue
import re
import shutil
import subprocess
import threading
from pathlib import Path

from .say import Bar, Stop

PIN = "pip==26.3"
PROGRESS = "raw"  # How pip reports its progress: in lines to be read here.
SMALL = 5_000_000  # Bytes; a download up to this size gets no bar.

_NO_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError|Temporary failure in name resolution"
    r"|Failed to establish a new connection|Connection refused|Network is unreachable|ProxyError|getaddrinfo failed"
)
_NO_SPACE = re.compile(r"No space left on device|\[Errno 28\]|not enough space on the disk", re.IGNORECASE)
_HASH = re.compile(r"DO NOT MATCH THE HASHES")


def python_of(venv: Path) -> Path:
    """The interpreter of the virtual environment `venv`."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def site_of(venv: Path) -> Path:
    """The folder that holds the packages of the virtual environment `venv`."""
    return venv / "Lib/site-packages" if os.name == "nt" else next(venv.glob("lib/python3*/site-packages"))


def heal(venv: Path) -> None:
    """Remove what an install that was killed left behind: pip takes a package without a RECORD for a complete one."""
    site = site_of(venv)
    for info in site.glob("*.dist-info"):
        if not (info / "RECORD").is_file():
            shutil.rmtree(info)
    for leftover in site.glob("~*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def install(venv: Path, requirements: tuple[str, ...], cache: Path, name: str) -> None:
    """Install requirement lines into `venv`. Raises Stop; the whole output is kept in `cache`."""
    listing = cache / f"requirements-{name}.txt"
    listing.write_text("\n".join(requirements) + "\n", "utf-8")
    run(venv, ["install", "-r", str(listing)], cache, name)


def run(venv: Path, arguments: list[str], cache: Path, name: str) -> None:
    """Run pip with a progress bar. Raises Stop with the likely cause; the whole output is kept in `cache`."""
    log, temporary = cache / f"pip-{name}.log", cache / f"tmp-{name}"
    temporary.mkdir(parents=True, exist_ok=True)
    # Large wheels are unpacked in the temporary folder: it has to lie on the disk whose room was checked.
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary)}
    bar_style = "off" if name == "pip" else PROGRESS  # The pip that comes with older Pythons does not know "raw".
    command = [str(python_of(venv)), "-m", "pip", *arguments, "--progress-bar", bar_style, "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "30"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    lines: queue.Queue = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        with log.open("w", encoding="utf-8") as file:
            _follow(lines, file, Bar(name), site_of(venv))
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        reader.join(timeout=5)
        if not reader.is_alive():
            process.stdout.close()
        shutil.rmtree(temporary, ignore_errors=True)
    if code:
        raise Stop(explain(log.read_text("utf-8"), log))


def _read(stream, lines) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _follow(lines, file, bar: Bar, site: Path) -> None:
    """Copy pip's lines to `file` and keep the bar moving: bytes while it downloads, packages while it installs."""
    wanted: set = set()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            line = ""
        if line is None:
            break
        if progress := re.match(r"Progress (\d+) of (\d+)", line):
            if int(progress[2]) > SMALL:
                bar.show(int(progress[1]) / 1e6, int(progress[2]) / 1e6, "MB")
            continue
        file.write(line)
        if found := re.match(r"\s*Downloading (\S+)", line):
            bar.label = found[1].rsplit("/", 1)[-1].split("-")[0]
        elif line.startswith("Installing collected packages:"):
            bar.close()
            bar.label = "packages installed"
            wanted = {_plain(word) for word in line.split(":", 1)[1].split(",")}
        if wanted:
            there = {_plain(info.name.split("-")[0]) for info in site.glob("*.dist-info")}
            bar.show(len(wanted & there), len(wanted))
    bar.close()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def explain(output: str, log: Path) -> str:
    """One sentence for why pip failed, from its output."""
    if _NO_SPACE.search(output):
        return f"The disk is full: pip could not write; make room (about 8 GB) and run this again ({log})."
    if _HASH.search(output):
        return f"A download does not have the hash it should have: run this again, and report it if it stays ({log})."
    if _NO_NETWORK.search(output):
        return f"No network: pip could not reach the package index; what is done is kept, run this again ({log})."
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return f"pip failed: {(errors or lines or ['it printed nothing'])[-1]} ({log})."
