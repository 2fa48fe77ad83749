"""The package `kernels` of the package index, which loads kernels of the Hugging Face Hub."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from types import ModuleType

INSTALL = "pip install kernels"


def hub_package() -> ModuleType:
    """Import it. Raises ImportError with one sentence on how to get it.

    This pack has a folder of the same name, which comes first where its root is on the import path (the current folder
    of `python -m`, say). So the package is imported from where it was installed, and not by its name.
    """
    module = sys.modules.get("kernels")
    try:
        if module is None:
            file = str(importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py"))
            # Not there: installed as editable, and its own finder knows where.
            module = _import_file(file) if os.path.isfile(file) else importlib.import_module("kernels")
    except ImportError as error:
        raise ImportError(f"The package that loads kernels of the Hub is missing: {INSTALL} ({error})") from error
    if not hasattr(module, "get_local_kernel"):
        where = getattr(module, "__file__", None) or list(getattr(module, "__path__", ()))
        raise ImportError(f"{where} is not the package that loads kernels of the Hub, or too old: {INSTALL} -U")
    return module


def _import_file(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels", file, submodule_search_locations=[os.path.dirname(file)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop("kernels", None)
        raise
    return module
