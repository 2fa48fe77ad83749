"""For ATTUNE_EXTRA_KERNELS: the pack's kernels of other packages, widened so that their stand-ins run on the CPU.

    ATTUNE_EXTRA_KERNELS=<this file> PYTHONPATH=<tests/standins/sage2>

A node that names sage2_fp8_cuda in a ComfyUI on the CPU then really runs the stand-in, through the pack's own adapter.
Widened are the device, Triton and the data types: a call whose dtype the kernel does not take is computed in float16.
What a kernel says about calls (masks, head dimensions, grouped queries, scales) and about versions stays.

ATTUNE_STANDIN_FAULT lets a kernel go wrong: NAME:KIND:WHEN, several separated by ";". Calls of a kernel are numbered
from 0, in each process by themselves; a call that reaches another kernel does not count.

    KIND    nan          the whole output is NaN
            inf_row      one row of one head is infinite
            error=0.06   noise of this relative L2 size is added; the same call gets the same noise
            raise        RuntimeError
            exit         the process ends at once, with exit code 66
            print        a million characters are written to the standard output
            patch        torch.matmul is replaced by a function that does the same
    WHEN    from=N       call N and every later one; from=0 is every call
            call=N       this call only
            odd          calls 1, 3, 5, …
            every=K,at=J calls whose number modulo K is J: with K calls in a forward, one block
            block=N      calls in block N of a model; block=N,kind=self (or cross) only those of this kind

    sage2_fp8_cuda:nan:from=40        flash2:error=0.06:every=4,at=2;flash2:raise:call=9        sage1:nan:block=3

ATTUNE_STANDIN_FAULT_FILE names a file with such a specification, which takes the place of ATTUNE_STANDIN_FAULT: a
kernel reads it whenever it is loaded, that is at the first call of each kind in a sampling run. When it was written
anew, the calls are numbered from 0 again; where it is missing, there are no faults.

A fault hits only in a process that has ATTUNE_STANDIN_FAULT_IN=server and is no child of the doctor, which so proves
the kernel good. "anywhere:" before the kind (sage1:anywhere:nan:from=0) hits everywhere. A specification that cannot
be read, or names a kernel that is not here, is a ValueError: the file is left out and the log says why.

ATTUNE_STANDIN_FAST names a kernel that `auto` with precision `fast` tries first on the CPU, where it has none.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..attention import machine
from ..attention.kernel import Kernel, Run
from . import KERNELS as PACK

KINDS_OF_CALLS = ("self", "cross")
KINDS = ("nan", "inf_row", "error", "raise", "exit", "print", "patch")
EXIT_CODE = 66
DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Fault:
    """What goes wrong (`size` belongs to "error"), in which calls, and whether in every process.

    `numbers` chooses calls by their number, `block` and `block_kind` ("": both) by where they are made.
    """

    kernel: str
    kind: str
    size: float
    numbers: Callable[[int], bool]
    anywhere: bool
    block: int | None = None
    block_kind: str = ""

    def hits(self, index: int) -> bool:
        """Does it hit call `index`, which is being made now?"""
        if not self.numbers(index):
            return False
        if self.block is None:
            return True
        block, kind = place() or (None, "")
        return block == self.block and self.block_kind in ("", kind)


def place() -> tuple[int | None, str] | None:
    """(block, "self" or "cross") of the call that is being made; None outside the pack's router.

    A kernel is not told; the router's frame, which is further up the stack, knows it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and Path(code.co_filename).parts[-2:] == ("attention", "router.py"):
            call = frame.f_locals["route"].call
            return call and (call.block, call.kind)
        frame = frame.f_back
    return None


def _number(text: str, least: int = 0) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise ValueError(f"wanted a number of at least {least}, found {text!r}")
    return int(text)


def _when(text: str) -> dict[str, Any]:
    """The fields of a Fault that WHEN stands for."""
    word, _, value = text.partition("=")
    match word:
        case "odd" if text == "odd":
            return {"numbers": lambda index: index % 2 == 1}
        case "from":
            first = _number(value)
            return {"numbers": lambda index: index >= first}
        case "call":
            only = _number(value)
            return {"numbers": lambda index: index == only}
        case "block":
            number, comma, kind = value.partition(",kind=")
            if comma and kind not in KINDS_OF_CALLS:
                raise ValueError(f"wanted {' or '.join(KINDS_OF_CALLS)}, found {kind!r}")
            return {"numbers": lambda _index: True, "block": _number(number), "block_kind": kind}
        case "every":
            every, _, at = value.partition(",at=")
            modulus, rest = _number(every, 1), _number(at)
            if rest >= modulus:
                raise ValueError(f"{text!r} hits nothing: at has to be below every")
            return {"numbers": lambda index: index % modulus == rest}
    raise ValueError(f"wanted from=N, call=N, odd, every=K,at=J or block=N, found {text!r}")


def parse_faults(text: str) -> list[Fault]:
    """The faults of a specification as above; raises ValueError with what was wanted and what was found."""
    faults = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        fields = part.split(":")
        anywhere = fields[1:2] == ["anywhere"]
        if anywhere:
            del fields[1]
        if len(fields) != 3:
            raise ValueError(f"wanted NAME:KIND:WHEN or NAME:anywhere:KIND:WHEN, found {part!r}")
        name, kind, when = fields
        kind, _, value = kind.partition("=")
        if kind not in KINDS:
            raise ValueError(f"wanted one of {', '.join(KINDS)}, found {kind!r}")
        if (kind == "error") is not bool(value):
            raise ValueError(f"error=SIZE has a size and the others have none, found {fields[1]!r}")
        size = float(value) if value else 0.0
        if kind == "error" and not 0 < size < float("inf"):
            raise ValueError(f"wanted a size above 0, found {value!r}")
        faults.append(Fault(name, kind, size, anywhere=anywhere, **_when(when)))
    return faults


def spoil(out: torch.Tensor, fault: Fault, index: int) -> torch.Tensor:
    """`out` of call `index` with the fault in it; raises or ends the process where the fault does."""
    match fault.kind:
        case "nan":
            return torch.full_like(out, float("nan"))
        case "inf_row":
            out = out.clone()
            out[0, 0, 0] = float("inf")  # a row of a head in both layouts, (B, H, N, D) and (B, N, H, D)
            return out
        case "error":
            noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(index)).to(out.device)
            return (out.float() + noise * (fault.size * out.float().norm() / noise.norm())).to(out.dtype)
        case "raise":
            raise RuntimeError(f"stand-in fault of {fault.kernel} in call {index}")
        case "print":
            print("x" * 1_000_000, flush=True)
            return out
        case "patch":
            real = torch.matmul
            torch.matmul = lambda *args, **others: real(*args, **others)
            return out
    os._exit(EXIT_CODE)


def hits_here(fault: Fault) -> bool:
    """Does the fault hit in this process?"""
    proved = bool(sys.argv) and Path(sys.argv[0]).name == "kernel_child.py"
    return fault.anywhere or (os.environ.get("ATTUNE_STANDIN_FAULT_IN") == "server" and not proved)


class Faults:
    """The faults of this process, and the number of the next call of each kernel."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._written: tuple[int, str] | None = None
        self._read(os.environ.get("ATTUNE_STANDIN_FAULT", ""))

    def _read(self, text: str) -> None:
        self._faults = parse_faults(text)
        for fault in self._faults:
            if fault.kernel not in self._names:
                raise ValueError(
                    f"there is no stand-in for a kernel called {fault.kernel!r}; there are {sorted(self._names)}"
                )
        # For all loads of a kernel: a router loads it for every new kind of call.
        self.calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)

    def of(self, kernel: str) -> list[Fault]:
        """What goes wrong in this kernel, in this process, as the file says now."""
        file = os.environ.get("ATTUNE_STANDIN_FAULT_FILE")
        if file:
            path = Path(file)
            written = (path.stat().st_mtime_ns, path.read_text("utf-8")) if path.exists() else (0, "")
            if written != self._written:
                self._written = written
                self._read(written[1])
        return [fault for fault in self._faults if fault.kernel == kernel and hits_here(fault)]


def widened(kernel: Kernel, faults: Faults) -> Kernel:
    """`kernel` with needs that the CPU meets, and the faults that are its own."""
    needs = replace(kernel.needs, devices=kernel.needs.devices | {"cpu"}, dtypes=DTYPES, triton=False)

    def load() -> Run:
        real = kernel.load()
        own = faults.of(kernel.name)

        def run(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            mask: torch.Tensor | None = None,
            scale: float | None = None,
        ) -> torch.Tensor:
            dtype, index = q.dtype, next(faults.calls[kernel.name])
            if dtype not in kernel.needs.dtypes:
                q, k, v = q.half(), k.half(), v.half()
            out = real(q, k, v, mask=mask, scale=scale).to(dtype)
            for fault in own:
                if fault.hits(index):
                    out = spoil(out, fault, index)
            return out

        return run

    # What float16 costs a float32 call is between the tolerances of the two half precisions.
    tolerance = {dtype: kernel.tolerance.get(dtype, max(kernel.tolerance.values())) for dtype in DTYPES}
    return replace(kernel, needs=needs, load=load, tolerance=tolerance)


def _kernels() -> tuple[Kernel, ...]:
    chosen = [kernel for kernel in PACK if kernel.package not in ("", "torch") and "cpu" not in kernel.needs.devices]
    faults = Faults({kernel.name for kernel in chosen})
    return tuple(widened(kernel, faults) for kernel in chosen)


if os.environ.get("ATTUNE_STANDIN_FAST"):
    exact, fast = machine._TABLE[machine.Architecture.CPU]
    machine._TABLE[machine.Architecture.CPU] = (exact, (os.environ["ATTUNE_STANDIN_FAST"], *fast))
KERNELS = _kernels()
