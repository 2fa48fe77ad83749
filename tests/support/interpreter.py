"""The pack's Triton kernels on the CPU: a child process in which Triton's interpreter runs them.

Triton asks for TRITON_INTERPRET while it is imported, and other tests compile kernels in this process. Run as a
program this file is the child: it takes pickled requests from its input and answers on its output.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# For skipif: why kernels cannot be run or compiled here, or "".
WHY_NOT = "" if importlib.util.find_spec("triton") else "Triton is not installed; it has no wheels for this system"


class Interpreter:
    """`attend(...)` runs a kernel as its adapter's Run would; what the kernel raises is a RuntimeError here."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        self._child = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, what: str, *arguments: Any, **options: Any) -> Any:
        assert self._child.stdin and self._child.stdout
        pickle.dump((what, arguments, options), self._child.stdin)
        self._child.stdin.flush()
        fine, answer = pickle.load(self._child.stdout)
        if not fine:
            raise RuntimeError(answer)
        return answer

    def attend(
        self,
        kernel: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
        tile: dict[str, Any] | None = None,
        backwards: bool = False,
    ) -> torch.Tensor:
        """`tile`: fields of the kernels' Tile that are other than INTERPRETER's. Inputs must stay as they are.

        `backwards`: programs of a launch run in the opposite order, the last one first.
        """
        options = {"mask": mask, "scale": scale, "tile": tile or {}, "backwards": backwards}
        return self.ask("attend", kernel, q, k, v, **options)

    def stop(self) -> None:
        assert self._child.stdin and self._child.stdout
        self._child.stdin.close()
        self._child.wait(30)
        self._child.stdout.close()


def _attend(
    kernel: str, *tensors: torch.Tensor, mask: Any, scale: Any, tile: dict[str, Any], backwards: bool = False
) -> torch.Tensor:
    from comfyui_attune.kernels.int8 import launch, tiles

    function = {"attune_int8": launch.int8_attention, "attune_bf16": launch.exact_attention}[kernel]
    before = [None if t is None else t.clone() for t in (*tensors, mask)]
    with _backwards() if backwards else contextlib.nullcontext(), _spoilt_memory():
        out = function(*tensors, mask=mask, scale=scale, tile=replace(tiles.INTERPRETER, **tile))
    for name, old, new in zip("qkvm", before, (*tensors, mask), strict=True):
        assert old is None or torch.equal(old.nan_to_num(), new.nan_to_num()), f"{name} was modified"
    return out


def _far_apart(kernel: str, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs on tensors (B, tokens, H, D) that lie 2**30 numbers apart along an axis, and on copies of them."""
    shape = [2, 4, 2, 64]
    shape[axis] = 3
    strides = [1024, 128, 64, 1]
    strides[axis] = 2**30
    room = torch.empty(2**31 + 8192, dtype=torch.float16)  # never touched but for a few numbers
    far = room.as_strided(shape, strides)
    far.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    near = far.contiguous()
    options: dict[str, Any] = {"mask": None, "scale": None, "tile": {}}
    return _attend(kernel, far, far, far, **options), _attend(kernel, near, near, near, **options)


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    from support.e4m3_kernel import round_all

    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    round_all[(1,)](x, out, x.numel())
    return out.float()


@contextlib.contextmanager
def _spoilt_memory() -> Iterator[None]:
    """torch.empty() gives NaN and largest numbers, as what lies in a GPU's memory may be: no kernel may count on it."""
    torch.use_deterministic_algorithms(True)  # which fills it, unless told otherwise
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _backwards() -> Iterator[None]:
    """A GPU runs programs in whatever order it likes; this is the one that differs most from the interpreter's own."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_grid_idx = builder.set_grid_idx

    def from_the_end(*place: int) -> None:
        set_grid_idx(*(size - 1 - at for size, at in zip(builder.grid_dim, place, strict=True)))

    with mock.patch.object(builder, "set_grid_idx", from_the_end):
        yield


def _descriptor_loads(*arguments: Any, **options: Any) -> tuple[torch.Tensor, int]:
    """The output, and how many blocks its programs have loaded through tensor descriptors."""
    from triton.runtime.interpreter import interpreter_builder as builder

    with mock.patch.object(builder, "create_descriptor_load", wraps=builder.create_descriptor_load) as load:
        return _attend(*arguments, **options), load.call_count


def _mend() -> None:
    """Triton 3.6 counts loops with int() of an array of one number, which NumPy refuses from 2.4 on."""
    from triton.runtime import interpreter

    set_attr = interpreter._LangPatchScope.set_attr

    def mended(scope: object, obj: object, name: str, value: object) -> None:
        set_attr(scope, obj, name, (lambda tensor: int(tensor.handle.data.item())) if name == "__index__" else value)

    interpreter._LangPatchScope.set_attr = mended


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed
    warnings.simplefilter("ignore")  # NumPy tells of every infinity and NaN
    from support.loading import ROOT, load_package

    load_package("comfyui_attune", ROOT)
    torch.set_num_threads(1)
    _mend()
    known = {"attend": _attend, "descriptor loads": _descriptor_loads, "far apart": _far_apart, "e4m3": _e4m3}
    with contextlib.suppress(EOFError):
        while True:
            what, arguments, options = pickle.load(sys.stdin.buffer)
            try:
                answer = True, known[what](*arguments, **options)
            except Exception:
                answer = False, traceback.format_exc()
            pickle.dump(answer, answers)
            answers.flush()


if __name__ == "__main__":
    main()
