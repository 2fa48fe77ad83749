"""A ComfyUI server as a child process on a loopback port, and JSON over HTTP to it."""

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from . import ROOT
from .say import Stop

ADDRESS = "127.0.0.1"
# A proxy that is set for the internet must not be asked for this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """A port of the loopback address that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


def require_port(port: int) -> int:
    """Return `port`; raises Stop when it is taken."""
    with socket.socket() as probe:
        if probe.connect_ex((ADDRESS, port)) != 0:
            return port
    raise Stop(f"Port {port} on {ADDRESS} is busy: leave --port away for a free one, or name another.")


class Host:
    """One server. `start()` returns when it answers; `stop()` ends it. `log` is the file of its output.

    python: interpreter to run it with; comfyui: folder of ComfyUI; base: its base directory (see make_base);
    flags: further launch flags of ComfyUI; env: environment variables on top of this process's own.
    """

    def __init__(self, python: Path, comfyui: Path, base: Path, flags=(), port: int = 0, env=None):
        self.python, self.comfyui, self.base, self.flags = python, comfyui, base, tuple(flags)
        self.port = port or free_port()
        self.env = env or {}
        self.log = base / "server.log"
        self.process = None

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}"

    def start(self, seconds: float = 180) -> None:
        """Start the server and wait until it answers. Raises Stop with the last lines of its log."""
        command = [str(self.python), str(ROOT / "devtools" / "run_host.py"), str(self.comfyui / "main.py")]
        command += ["--listen", ADDRESS, "--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", *self.flags]
        env = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1", **self.env}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=self.base
            )
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.get("/system_stats", timeout=2)
                return
            except (OSError, ValueError):
                pass
            if self.process.poll() is not None:
                self.stop()
                text = self.output()
                if re.search(r"address already in use|\[Errno (98|48|10048)\]", text, re.IGNORECASE):
                    raise Stop(f"Port {self.port} on {ADDRESS} is busy: run this again, or name another with --port.")
                code = self.process.returncode
                raise Stop(f"ComfyUI stopped at start with exit code {code}; {_tail(text, self.log)}")
            if time.monotonic() > deadline:
                self.stop()
                raise Stop(f"ComfyUI did not answer within {seconds:.0f} seconds; {_tail(self.output(), self.log)}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End the server; does nothing when it is not running."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process and self.process.stdin:
            self.process.stdin.close()

    def output(self) -> str:
        """What the server has written so far, without colours."""
        return re.sub(r"\x1b\[[\d;]*m", "", self.log.read_text("utf-8", errors="replace"))

    def get(self, path: str, timeout: float = 30):
        """GET `path` and return the JSON. Raises OSError (HTTPError has .code) or ValueError."""
        with _opener.open(self.url + path, timeout=timeout) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, data, timeout: float = 30):
        """POST `data` as JSON to `path` and return the JSON of the answer. Raises as get()."""
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(), kind)
        with _opener.open(request, timeout=timeout) as answer:
            return json.loads(answer.read() or b"null")


def _tail(text: str, log: Path) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return f"its last words: {lines[-1] if lines else 'none'} (all of them: {log})."
