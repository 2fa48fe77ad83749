"""Run this folder as a program: `python <folder> kernels`, under whatever name the folder lies.

The folder may hold dashes and dots and is not importable by its own name, and it must never stand on `sys.path`: it
holds a `nodes` and a `kernels` that would hide others.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

if __package__:
    from .cli import main
else:
    root = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != root]
    spec = importlib.util.spec_from_file_location(
        "comfyui_attune", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_attune"] = package
    spec.loader.exec_module(package)
    main = importlib.import_module("comfyui_attune.cli").main

sys.exit(main())
