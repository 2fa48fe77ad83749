"""A ComfyUI in which stand-ins run as kernels on the CPU."""

import os

from .loading import ROOT

STANDINS = ROOT / "tests" / "standins"


def environment(home, *variants, fault="", fault_file="", fast="") -> dict[str, str]:
    """Environment variables for a server: the stand-ins `variants` are installed, one of them perhaps with a fault.

    `home` is the folder of the pack's state. `fault`, or what `fault_file` holds, and `fast`: see
    tests/standins/extra_kernels.py.
    """
    paths = [*(str(STANDINS / variant) for variant in variants), os.environ.get("PYTHONPATH", "")]
    return {
        "ATTUNE_HOME": str(home),
        "ATTUNE_EXTRA_KERNELS": str(STANDINS / "extra_kernels.py"),
        "ATTUNE_STANDIN_SM": "89",
        "ATTUNE_STANDIN_FAULT": fault,
        "ATTUNE_STANDIN_FAULT_FILE": str(fault_file),
        "ATTUNE_STANDIN_FAULT_IN": "server",
        "ATTUNE_STANDIN_FAST": fast,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
