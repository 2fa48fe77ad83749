"""The kernels: one file per family, each exporting `KERNELS`. To add a kernel, add a file.

A kernel that is not in the pack is tried by naming its file in ATTUNE_EXTRA_KERNELS: docs/kernels.md.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..attention.kernel import Kernel
from ..attention.policy import KERNEL_NAMES

EXTRA = "ATTUNE_EXTRA_KERNELS"
log = logging.getLogger("attune")


def _place(kernel: Kernel) -> tuple[int, str]:
    """The order of node option lists, and of `attune kernels`; a name that is missing there comes last."""
    return (KERNEL_NAMES.index(kernel.name) if kernel.name in KERNEL_NAMES else len(KERNEL_NAMES)), kernel.name


KERNELS: tuple[Kernel, ...] = tuple(
    sorted(
        (
            kernel
            for module in pkgutil.iter_modules(__path__)
            for kernel in getattr(importlib.import_module(f"{__name__}.{module.name}"), "KERNELS", ())
        ),
        key=_place,
    )
)


def _name(kernels: tuple[Kernel, ...]) -> None:
    """Let users ask for kernels whose names stand nowhere but in their own files."""
    KERNEL_NAMES.extend(kernel.name for kernel in kernels if kernel.name not in KERNEL_NAMES)


def _exported(path: Path, number: int) -> object:
    """`KERNELS` of the file at `path`, imported as a submodule of this package. Raises whatever the file raises."""
    if not path.is_absolute():
        # The doctor's children run in another folder.
        raise ValueError("wanted an absolute path")
    spec = importlib.util.spec_from_file_location(f"{__name__}.extra_{number}", path)
    if spec is None or spec.loader is None:
        raise ValueError("wanted a Python file, its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return getattr(module, "KERNELS", None)


def _extra(listed: str) -> Iterator[Kernel]:
    """The kernels of the files in `listed`, which is written like PATH. What cannot be had is a line in the log."""
    for number, name in enumerate(filter(None, map(str.strip, listed.split(os.pathsep)))):
        path = Path(name).expanduser()
        try:
            found = _exported(path, number)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except (Exception, SystemExit) as error:  # Somebody else's code: the pack goes on without it.
            log.warning("Attune: %s: %s was left out (%s: %s).", EXTRA, path, type(error).__name__, error)
            continue
        if not isinstance(found, (tuple, list)):
            said = "has none" if found is None else f"has a {type(found).__name__} there"
            log.warning("Attune: %s: wanted a tuple of kernels called KERNELS, %s %s.", EXTRA, path, said)
            continue
        for kernel in found:
            if isinstance(kernel, Kernel):
                # It is proved whatever it says of itself, and again when its file has changed.
                yield replace(kernel, needs_proof=True, origin=f"{path} {digest}")
            else:
                log.warning("Attune: %s: wanted a Kernel in KERNELS of %s, found %.80r.", EXTRA, path, kernel)


def with_extra(listed: str) -> tuple[Kernel, ...]:
    """The pack's kernels and those of the files in `listed`; a later one takes the place of one of its name."""
    known = {kernel.name: kernel for kernel in KERNELS}
    extra = {kernel.name: kernel for kernel in _extra(listed)}
    if extra:
        # Who reads a log has to know which kernels are not the pack's.
        taken = ", ".join(name for name in extra if name in known) or "none"
        added = ", ".join(name for name in extra if name not in known) or "none"
        log.info("Attune: kernels of %s: %s in place of the pack's, new: %s.", EXTRA, taken, added)
    return tuple(sorted({**known, **extra}.values(), key=_place))


if os.environ.get(EXTRA, "").strip():
    KERNELS = with_extra(os.environ[EXTRA])
_name(KERNELS)
