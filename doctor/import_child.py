"""Started by file path: imports one attention package just as ComfyUI does, and writes down how that went.

    python import_child.py REQUEST.json

The request is {"package", "path": the search path of the host's process, "hide": [names], "result": file, "limit": s}.
The result file gets one line of JSON when torch is there and one when the package is. Whatever the package does to this
process is the answer, too: the starter sees how it ended.
"""

# Everything that is needed later is imported now: the package may do anything to this process.
import faulthandler
import inspect
import json
import os
import sys
import time
import traceback
from sys import path


def sageattention():
    from sageattention import sageattn

    return "attn_mask" in inspect.signature(sageattn).parameters


def sageattn3():
    from sageattn3 import sageattn3_blackwell

    return sageattn3_blackwell


def flash_attn():
    from flash_attn import flash_attn_func

    return flash_attn_func


def xformers():
    import xformers
    import xformers.ops

    return xformers.ops


# The host's own lines. Source: comfy/ldm/modules/attention.py and comfy/model_management.py of ComfyUI 0.30.
HOST_LINES = {"sageattention": sageattention, "sageattn3": sageattn3, "flash_attn": flash_attn, "xformers": xformers}
# What a package could replace under everybody's feet.
TORCH = ("nn.functional.scaled_dot_product_attention", "nn.functional.softmax", "softmax", "matmul", "bmm", "baddbmm")


def parts_of_torch(torch):
    found = {}
    for name in TORCH:
        value = torch
        for part in name.split("."):
            value = getattr(value, part, None)
        found[name] = value
    return found


def changes(before, torch_before, torch):
    """What the import changed for the whole process, in words."""
    found = []
    if added := [entry for entry in path if entry not in before]:
        found.append(f"adds {len(added)} entries to the search path, the first is {added[0]}")
    if gone := [entry for entry in before if entry not in path]:
        found.append(f"takes {len(gone)} entries off the search path")
    after = parts_of_torch(torch) if torch else {}
    found += [f"replaces torch.{name}" for name, value in after.items() if value is not torch_before[name]]
    return found


def words(error):
    try:
        text = str(error)
    except BaseException:
        text = "(its text cannot be read)"
    return f"{type(error).__name__}: {text}"[:2000]


def quiet_windows():
    """Without this a crash would wait for somebody to click a dialog away."""
    if os.name == "nt":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x0001 | 0x0002)  # SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX


def main(write=os.write, encode=json.dumps, leave=os._exit, clock=time.perf_counter):
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    quiet_windows()
    # Ends this process also when its starter is gone, and when no Python code gets to run.
    faulthandler.dump_traceback_later(request["limit"], exit=True)
    result = os.open(request["result"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(**values):
        write(result, (encode(values) + "\n").encode("utf-8", "replace"))

    path[:] = request["path"]
    for name in request["hide"]:
        sys.modules[name] = None
    started = clock()
    try:
        import torch
    except ModuleNotFoundError:
        torch = None
    torch_before, before = parts_of_torch(torch) if torch else {}, list(path)
    say(torch=clock() - started)
    started = clock()
    try:
        HOST_LINES[request["package"]]()
    except ImportError as error:
        say(outcome="cannot import", detail=words(error), raw=traceback.format_exc()[-4000:])
    except BaseException as error:
        say(outcome="raises", detail=words(error), raw=traceback.format_exc()[-4000:])
    else:
        say(outcome="works", seconds=clock() - started, notes=changes(before, torch_before, torch))
    leave(0)  # What a package does when Python ends is not asked here.


if __name__ == "__main__":
    main()
