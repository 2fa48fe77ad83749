"""Started by file path: proves one kernel on small tensors and writes down how far it got and what came out.

    python kernel_child.py REQUEST.json

The request is {"pack": the pack's folder, "kernel": name, "machine": machine_as_json(), "device": name of the GPU the
calls are for, "tensors": where tensors are made, "path": search path, "limit": seconds, "parent": the process to end
with, "result": file}. The result file gets a line of JSON for each step and a last one with "outcome". How this process
ends is an answer too.
"""

# Everything that is needed later is imported now: the package may do anything to this process.
import faulthandler
import importlib
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from sys import path

# Source: what torch puts into the text of an error after which its context on the GPU is lost.
LOST = ("CUDA error: an illegal", "CUDA error: unspecified launch failure", "CUDA error: misaligned address",
        "CUDA error: device-side assert", "CUDA error: uncorrectable", "HIP error: an illegal")  # fmt: skip


def load_pack(folder):
    """The pack under the name comfyui_attune, without its folder on the search path (see __main__.py)."""
    root = Path(folder)
    spec = importlib.util.spec_from_file_location(
        "comfyui_attune", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    sys.modules["comfyui_attune"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["comfyui_attune"])


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


def outlive_nobody(parent, leave=os._exit, sleep=time.sleep):
    """End this process soon after the one that started it: nobody else would."""
    if os.name == "nt":
        try:
            from psutil import pid_exists
        except ImportError:
            return  # the time limit remains
    else:

        def pid_exists(pid):
            return os.getppid() == pid

    def watch():
        while pid_exists(parent):
            sleep(1)
        leave(1)

    threading.Thread(target=watch, daemon=True).start()


def failure(error, torch, step):
    """The outcome of an exception that the kernel raised when it was called.

    Whether its words tell of short memory or a full disk the starter judges, for these and for those of the import.
    """
    said = {"detail": f"{words(error).partition(chr(10))[0]} ({step})", "raw": traceback.format_exc()[-4000:]}
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return {"outcome": "undecided", **said}
    if any(text in said["raw"] for text in LOST):
        return {"outcome": "crashed", **said}
    if isinstance(error, ImportError):  # Triton and CuTe import and compile at the first call.
        return {"outcome": "cannot import", **said}
    return {"outcome": "unsupported", **said}


def prove(request, say):
    """The answer for one kernel. Inputs and references are made before it is imported, so it cannot spoil them."""
    import torch

    trials = importlib.import_module("comfyui_attune.doctor.trials")
    kernels = importlib.import_module("comfyui_attune.kernels").KERNELS
    kernel = next(kernel for kernel in kernels if kernel.name == request["kernel"])
    machine = trials.machine_from_json(request["machine"])
    importlib.import_module("comfyui_attune.attention.machine").offer_fetched(machine.fetched)
    chosen = trials.trials(kernel, machine, machine.device(request["device"]))
    if not chosen:
        return {"outcome": "unsupported", "detail": "it claims none of the calls it could be tried with"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Small tensors; on a busy machine, more threads wait for each other most of the time.
    prepared = [trials.prepare(kernel, trial, request["tensors"]) for trial in chosen]
    wrong, worst, allowed = trials.Wrong, 0.0, None
    say(step="while it was imported")
    try:
        run = kernel.load()
    except BaseException as error:
        return {"outcome": "cannot import", "detail": words(error), "raw": traceback.format_exc()[-4000:]}
    with torch.no_grad():
        for count, one in enumerate(prepared, 1):
            step = f"in call {count}: {one.trial}"
            say(step=step)
            try:
                found = trials.judge(kernel, run, one)
            except BaseException as error:
                return failure(error, torch, step)
            if isinstance(found, wrong):
                values = {"error": found.error, "allowed": found.allowed, "calls": count}
                return {"outcome": "wrong numbers", "detail": found.detail, **values}
            limit = kernel.tolerance[one.trial.call.dtype]
            if allowed is None or found / limit > worst / allowed:
                worst, allowed = found, limit
        say(step="while it was timed")
        torch.set_num_threads(threads)
        try:
            milliseconds, timed = trials.timing(kernel, run, chosen[0], request["tensors"])
        except BaseException as error:
            return failure(error, torch, "while it was timed")
    values = {"error": worst, "allowed": allowed, "milliseconds": milliseconds, "timed": timed}
    return {"outcome": "works", **values, "calls": len(prepared)}


def refine(request, say):
    """The configurations of a proved kernel that are the fastest here. What goes wrong leaves the verdict as it is."""
    kernels = importlib.import_module("comfyui_attune.kernels").KERNELS
    kernel = next(kernel for kernel in kernels if kernel.name == request["kernel"])
    if kernel.tuning is None:
        return {}
    try:
        return kernel.tuning.refine(request["tensors"], lambda step: say(step=step))
    except BaseException as error:
        say(raw=f"while the fastest configuration was looked for: {words(error)}")
        return {}


def main(write=os.write, encode=json.dumps, leave=os._exit):
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    quiet_windows()
    # Ends this process also when its starter is gone, and when no Python code gets to run.
    faulthandler.dump_traceback_later(request["limit"], exit=True)
    outlive_nobody(request["parent"])
    result = os.open(request["result"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(**values):
        write(result, (encode(values) + "\n").encode("utf-8", "replace"))

    path[:] = request["path"]
    try:
        load_pack(request["pack"])
        answer = prove(request, say)
    except BaseException as error:  # Ours, not the kernel's: that one is caught where it is called.
        answer = {"outcome": "undecided", "detail": f"the probe failed: {words(error)}", "raw": traceback.format_exc()}
    say(**answer)
    if answer["outcome"] == "works" and (choice := refine(request, say)):
        say(choice=choice)
    leave(0)  # What a package does when Python ends is not asked here.


if __name__ == "__main__":
    main()
