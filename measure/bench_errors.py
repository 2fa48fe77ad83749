"""How far a kernel's output is from float32, on all queries or on some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..attention.call import Layout
from ..attention.errors import Errors, measure_errors
from ..attention.kernel import Kernel, Run
from ..attention.reference import reference_attention
from .bench_inputs import Inputs

ROWS = 128  # queries of each head that are compared, where all of them would take too long
_ALL = 2**26  # scores up to which all queries are compared


class Truth(NamedTuple):
    """Part of a call's right answer: the output's rows (all where None) for one kind of input, in float32."""

    kind: str
    rows: torch.Tensor | None
    wanted: torch.Tensor


def right_answers(inputs: Inputs, one: bool, seed: int) -> list[Truth]:
    """What every kernel is compared with; `one`: for the first kind of input only."""
    batch, heads, q_len, kv_len, dim = inputs.shape.numbers
    rows = None
    if batch * heads * q_len * kv_len > _ALL and q_len > ROWS:
        rows = torch.randperm(q_len, generator=torch.Generator().manual_seed(seed))[:ROWS]
    step = max(1, _ALL // (batch * kv_len * dim))  # heads whose keys and values are float32 at the same time
    found = []
    for kind in inputs.kinds[: 1 if one else None]:
        inputs.fill(kind)
        q, k, v = inputs.bhnd()
        q = q if rows is None else q[:, :, rows.to(q.device)]
        parts = [
            reference_attention(q[:, first : first + step], k[:, first : first + step], v[:, first : first + step])
            for first in range(0, heads, step)
        ]
        found.append(Truth(kind, rows, torch.cat(parts, 1)))
    return found


def _worst(errors: Sequence[Errors]) -> Errors:
    """The worst of each figure; NaN is worse than anything."""

    def largest(figures: list[float]) -> float:
        return math.nan if any(map(math.isnan, figures)) else max(figures)

    return Errors(
        -largest([-one.cosine for one in errors]),
        *(largest([getattr(one, name) for one in errors]) for name in ("l1", "l2", "largest")),
    )


def kernel_errors(run: Run, kernel: Kernel, inputs: Inputs, truths: Sequence[Truth]) -> Errors:
    """How far the kernel is from float32 on each kind of input. Raises ValueError where the output is no answer."""
    found = []
    for truth in truths:
        inputs.fill(truth.kind)
        out = run(*inputs.for_kernel(kernel.layout))
        now = inputs.for_kernel(kernel.layout)[0]
        wanted, dtype = now.shape, now.dtype
        if not isinstance(out, torch.Tensor) or out.shape != wanted or out.dtype is not dtype:
            got = f"{out.dtype} of {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"returned {got}, wanted {dtype} of {tuple(wanted)}")
        out = out if kernel.layout is Layout.BHND else out.transpose(1, 2)
        rows = truth.rows
        found.append(measure_errors(out if rows is None else out[:, :, rows.to(out.device)], truth.wanted))
    return _worst(found)
