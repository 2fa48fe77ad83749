#!/usr/bin/env python3
"""Set-up for a fresh machine, standard library only.

    python3 dev.py demo [--serve] [--port N] [--workflow FILE] [--break KIND]
    python3 dev.py test [--browser] [--no-comfyui] [--comfyui VERSION …] [--diffusers VERSION] [pytest arguments]

`demo --serve` leaves ComfyUI running until Ctrl+C, with --break too: then the kernel that breaks can be chosen in it.
Everything it makes lies in the git-ignored folders .venv and .cache of this checkout. It can be stopped and run again.
The parts are in devtools/, loaded by path: the root of this checkout must never be on sys.path, because ComfyUI has
a module named `nodes` of its own.
"""

import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != os.path.realpath(ROOT)]


def load_devtools():
    """Load the folder devtools/ under the name `attune_devtools` and return it."""
    folder = os.path.join(ROOT, "devtools")
    spec = importlib.util.spec_from_file_location(
        "attune_devtools", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["attune_devtools"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    if sys.version_info < (3, 10):
        sys.exit(
            "dev.py: Python 3.10 to 3.13 is needed, this is %d.%d: run it with one of those." % sys.version_info[:2]
        )
    load_devtools()
    sys.exit(importlib.import_module("attune_devtools.commands").main(sys.argv[1:]))
