"""Triton's interpreter, which runs kernels on the CPU. Import this before anything else imports Triton."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter  # noqa: E402

_set_attr = interpreter._LangPatchScope.set_attr


def _mended(scope: object, obj: object, name: str, value: object) -> None:
    """Triton 3.6 counts loops with int() of an array of one number, which NumPy refuses from 2.4 on."""
    if name == "__index__":
        value = lambda tensor: int(tensor.handle.data.item())  # noqa: E731
    _set_attr(scope, obj, name, value)


interpreter._LangPatchScope.set_attr = _mended
