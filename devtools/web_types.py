"""The types of web/: TypeScript's compiler over the JavaScript, with the types that ComfyUI's front end publishes."""

import shutil
import subprocess
from pathlib import Path

from . import CACHE, ROOT
from .say import Stop, step

# The front end's types are published for few versions: these are the nearest to what the pack is tested with.
PACKAGES = ("typescript@7.0.2", "@comfyorg/comfyui-frontend-types@1.45.6", "uplot@1.6.32")
FOLDER = CACHE / "web-types"  # web/tsconfig.json names it too
MISSING = "npm is not here: install Node.js 20 or newer (https://nodejs.org) to check the types of web/"


def obtain() -> Path | None:
    """TypeScript's compiler as a file for node, installed on first use; None where there is no npm. Raises Stop."""
    npm, compiler, done = shutil.which("npm"), FOLDER / "node_modules" / "typescript" / "bin" / "tsc", FOLDER / "done"
    if npm is None or shutil.which("node") is None:
        return None
    if not (done.exists() and done.read_text("utf-8") == "\n".join(PACKAGES)):
        step("Installing what checks the types of web/")
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-audit", "--no-fund", "--no-save", "--prefix", str(FOLDER), *PACKAGES]
        installed = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if installed.returncode:
            raise Stop(f"npm could not install {', '.join(PACKAGES)}: {installed.stderr.strip()[-500:]}")
        done.write_text("\n".join(PACKAGES), "utf-8")
    return compiler


def problems(compiler: Path, project: Path = ROOT / "web") -> str:
    """What the compiler says of the JavaScript in a folder; "" where it is content."""
    command = [shutil.which("node") or "node", str(compiler), "-p", str(project)]
    found = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    return (found.stdout + found.stderr).strip()
