"""Run dev.py in another process, as a user does."""

import os
import subprocess
import sys


def dev(folder, *arguments, **env):
    """Run dev.py of `folder`; returns the finished process."""
    clean = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    return subprocess.run(
        [sys.executable, str(folder / "dev.py"), *arguments],
        capture_output=True, text=True, encoding="utf-8", timeout=300, env={**clean, "PYTHONUTF8": "1", **env},
    )  # fmt: skip
