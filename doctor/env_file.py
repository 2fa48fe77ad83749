"""The line that makes a kernel the default of a ComfyUI, and putting it into the file of a start script."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..attention.kernel import Kernel, machine_reasons
from ..attention.machine import Machine, first_choices
from .probe import stored
from .store import home

VARIABLE = "COMFYUI_ATTENTION_MECHANISM"
_OURS = re.compile(rf"^[ \t]*(?:export[ \t]+)?{VARIABLE}=[^\r\n]*", re.MULTILINE)


def best_kernel(kernels: Mapping[str, Kernel], machine: Machine, fast: bool, folder: Path | None = None) -> str:
    """The first choice for this machine's main device that nothing known forbids, the doctor's kept verdicts included.

    Nothing is run to find it: for a kernel that needs a proof and has none yet, standard error says so. folder: where
    verdicts are kept, else doctor.store.home(). "host" where every choice is found bad.
    """
    names = [name for name in first_choices(machine.main_device.architecture, fast) if name in kernels]
    able = [kernels[name] for name in names if not machine_reasons(kernels[name], machine)]
    verdicts, _open = stored(able, machine, folder or home(Path(__file__).parents[1]))
    for kernel in able:
        verdict = verdicts.get(kernel.name)
        if verdict is None and kernel.needs_proof:
            print(f"{kernel.name} has not been tried here yet; `attune doctor` tries it.", file=sys.stderr)
        if verdict is None or verdict.works:
            return kernel.name
    return "host"


def env_line(kernel: str) -> str:
    return f"export {VARIABLE}={kernel}"


def write_line(path: Path, line: str) -> None:
    """Put `line` into the file, in the place of an earlier one of ours or at its end; all else stays as it is.

    The file is replaced as a whole or not at all, and made where it is missing. Raises OSError, and UnicodeDecodeError
    where the file is not text in UTF-8.
    """
    path = path.resolve()  # a link stays a link
    text = path.read_bytes().decode("utf-8") if path.exists() else ""
    newline = "\r\n" if "\r\n" in text else "\n"
    if _OURS.search(text):
        text = _OURS.sub(lambda _found: line, text)
    else:
        text += ("" if not text or text.endswith("\n") else newline) + line + newline
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8"))
        if path.exists():
            os.chmod(temporary, path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
