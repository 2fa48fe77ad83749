"""The command `attune run`: a script of somebody's, with every diffusers pipeline it makes patched, and not edited."""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib.util
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ..attention.policy import Rule
from ..doctor.quarantine import apply as apply_quarantine
from ..measure.run_text import runs_text
from .handle import Handle, apply, run_data
from .process import PACK, switched_off
from .standing import NAME

# Module → the class of pipelines in it, and its method that gives a new pipeline its models.
_MADE_IN = {
    "diffusers.pipelines.pipeline_utils": ("DiffusionPipeline", "register_modules"),
    "diffusers.modular_pipelines.modular_pipeline": ("ModularPipeline", "register_components"),
}
_NONE = "attune run: the script made no diffusers pipeline, or called none; there is nothing to report."


class _After(MetaPathFinder):
    """Calls `then(module)` when the module `name` has been imported, by whomever. On sys.meta_path until then."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


class _Loader(Loader):
    def __init__(self, real: Any, then: Callable[[ModuleType], None]) -> None:
        self._real, self._then = real, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: Any) -> Any:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        self._then(module)


class _Patched:
    """The pipelines that were patched as they were made. Holds none of them: a script may free its models."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self._made: list[tuple[Any, weakref.ref[Handle]]] = []

    def watch(self, module: ModuleType) -> None:
        """Patch every pipeline as soon as it has models; those of modular pipelines come one by one."""
        name, method = _MADE_IN[module.__name__]
        kind, made = getattr(module, name), self
        original = getattr(kind, method)

        @functools.wraps(original)
        def register(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            made.patch(self)

        setattr(kind, method, register)

    def patch(self, pipe: Any) -> None:
        if NAME in vars(pipe):
            return
        handle = apply(pipe, self.kernel, quiet=True)
        if NAME in vars(pipe):
            self._made.append((handle.runs, weakref.ref(handle)))

    def report(self) -> str:
        data = []
        for runs, reference in self._made:
            handle = reference()
            data += run_data(runs) if handle is None else handle.data()
        return runs_text(data) if data else _NONE


def _arguments(given: list[str], kernel: str | None) -> tuple[str, list[str]]:
    """(kernel, the script's own arguments). Without one before the script, --kernel may stand first behind it."""
    if kernel is not None:
        return kernel, given
    if given and given[0].startswith("--kernel="):
        return given[0].partition("=")[2], given[1:]
    return (given[1], given[2:]) if len(given) > 1 and given[0] == "--kernel" else ("auto", given)


def _report(patched: _Patched) -> None:
    """Whatever goes wrong here must not take the place of the script's own status or error."""
    with suppress(Exception):  # a script may have closed it
        sys.stdout.flush()
    try:
        print(f"\n{patched.report()}", file=sys.stderr)
    except Exception as error:
        with suppress(Exception):
            print(f"attune run: there is no report ({type(error).__name__}: {error})", file=sys.stderr)


class _Script(SourceFileLoader):
    """Compiles the file anew, as Python does with a script: nothing is written beside it."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _run_as_main(script: Path, arguments: list[str]) -> None:
    """Run the file as `python SCRIPT` does. Its module is __main__ until the process ends: what it leaves for the end
    (atexit, threads) may look for it."""
    path = os.path.abspath(script)
    loader = _Script("__main__", path)
    main = ModuleType("__main__")
    main.__file__, main.__loader__ = path, loader
    sys.modules["__main__"] = main
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    loader.exec_module(main)


def _run(options: argparse.Namespace) -> int:
    kernel, arguments = _arguments(options.arguments, options.kernel)
    try:
        Rule((kernel,))
        if not options.script.is_file():
            raise ValueError(f"there is no script {options.script}.")
    except ValueError as error:
        print(f"attune run: {error}", file=sys.stderr)
        return 2
    patched = _Patched(kernel)
    if not switched_off():
        apply_quarantine(PACK)
        for module in _MADE_IN:
            if module in sys.modules:
                patched.watch(sys.modules[module])
            else:
                sys.meta_path.insert(0, _After(module, patched.watch))
        atexit.register(_report, patched)  # after the script's threads and what it has registered itself
    _run_as_main(options.script, arguments)
    return 0


def add_run(commands: Any) -> None:
    """Add `run` to the parser's commands."""
    about = "a Python script, unchanged, with every diffusers pipeline it makes patched, and the report at its end"
    parser = commands.add_parser(
        "run",
        help=about,
        description=f"Run {about}. Packages that would end the process are kept out of it (quarantine). The script's "
        "arguments, exit status and signals are its own; the report goes to stderr.",
        usage="attune run [--kernel NAME] SCRIPT [arguments of the script]",
    )
    where = "any kernel's name; without it: auto. It may also stand right behind SCRIPT"
    parser.add_argument("--kernel", metavar="NAME", help=where)
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the script's file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script is given")
    parser.set_defaults(run=_run)
