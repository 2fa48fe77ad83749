"""A plan made ready to run: the kernel, and how it sees the host's tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .call import AttentionCall, Layout, Shape, input_view, output_view
from .guard import Limit
from .kernel import Kernel, Run
from .plan import Decision
from .record import Trail

if TYPE_CHECKING:
    from .trial import Trial


class Route:
    """A plan made ready to run: the loaded kernel and the views into and out of its layout.

    `run` None stands for the host's own attention; `trail` is how the plan came about. `guarded` says that outputs are
    watched, `limit` how far they may be from float32 (None: exact, never compared), `trial` that calls are timed.
    """

    __slots__ = (
        "call",
        "compared",
        "dtype",
        "guarded",
        "judged",
        "k_shape",
        "k_swap",
        "kernel",
        "limit",
        "mask_shape",
        "out_dtype",
        "out_shape",
        "out_swap",
        "q_shape",
        "q_swap",
        "run",
        "scale",
        "skips",
        "trail",
        "trial",
        "v_shape",
        "v_swap",
    )

    def __init__(self, trail: Trail, kernel: Kernel | None = None, run: Run | None = None) -> None:
        self.trail = trail
        self.kernel = kernel
        self.run = run
        self.call: AttentionCall | None = None
        self.guarded = False
        self.limit: Limit | None = None
        self.judged = 0  # calls that a Check has seen
        self.compared = False  # with float32, at least once
        self.trial: Trial | None = None
        self.skips = (False, False)  # skip_reshape, skip_output_reshape of the host's call
        self.scale: float | None = None
        self.dtype: torch.dtype | None = None  # set where q, k, v differ: what to convert them to
        self.out_dtype: torch.dtype | None = None
        self.q_shape: Shape | None = None
        self.k_shape: Shape | None = None
        self.v_shape: Shape | None = None
        self.mask_shape: Shape | None = None
        self.out_shape: Shape | None = None
        self.q_swap = self.k_swap = self.v_swap = self.out_swap = False

    @property
    def name(self) -> str:
        return self.trail[-1].kernel

    def fit(self, call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Settle the views for calls like `call`, which has these tensors. Needs `skips`."""
        assert self.kernel is not None
        skip_reshape, skip_output = self.skips
        layout = self.kernel.layout
        queries = (call.batch, call.q_len, call.heads, call.head_dim)
        keys = (call.batch, call.kv_len, call.kv_heads, call.head_dim)
        self.q_shape, self.q_swap = input_view(q.ndim, skip_reshape, queries, layout)
        self.k_shape, self.k_swap = input_view(k.ndim, skip_reshape, keys, layout)
        self.v_shape, self.v_swap = input_view(v.ndim, skip_reshape, (*keys[:3], call.v_dim), layout)
        self.out_swap, self.out_shape = output_view(call, skip_output, layout)
        self.mask_shape = call.mask.shape if call.mask else None
        if call.mixed_dtypes:
            self.dtype, self.out_dtype = call.dtype, q.dtype

    def beside(self, kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Route:
        """`kernel` for the calls of this route. Raises what loading it raises."""
        assert self.call is not None
        other = Route((Decision(kernel.name, self.trail[-1].requested, ""),), kernel, kernel.load())
        other.call, other.scale, other.skips = self.call, self.scale, self.skips
        other.fit(self.call, q, k, v)
        return other

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the kernel on the host's tensors, seen in its layout; the result is as the host wants it."""
        if self.dtype is not None:
            q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
        if self.q_shape is not None:
            q = q.view(*self.q_shape)
        if self.q_swap:
            q = q.transpose(1, 2)
        if self.k_shape is not None:
            k = k.view(*self.k_shape)
        if self.k_swap:
            k = k.transpose(1, 2)
        if self.v_shape is not None:
            v = v.view(*self.v_shape)
        if self.v_swap:
            v = v.transpose(1, 2)
        if mask is not None:
            mask = mask.view(*self.mask_shape)  # type: ignore[misc]
        out = self.run(q, k, v, mask=mask, scale=self.scale)  # type: ignore[misc]  # callers have checked it
        if self.out_swap:
            out = out.transpose(1, 2)
        if self.out_shape is not None:
            out = out.reshape(*self.out_shape)
        return out if self.out_dtype is None else out.to(self.out_dtype)

    def plainly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(q, k, v, out, mask) of a call in the host's layouts, as (B, H, N, D) views; the mask in four dimensions."""
        call, (skip_reshape, skip_output) = self.call, self.skips
        assert call is not None
        queries = (call.batch, call.q_len, call.heads, call.head_dim)
        keys = (call.batch, call.kv_len, call.kv_heads, call.head_dim)
        values = (*keys[:3], call.v_dim)

        def view(tensor: torch.Tensor, split: tuple[int, int, int, int]) -> torch.Tensor:
            shape, swap = input_view(tensor.ndim, skip_reshape, split, Layout.BHND)
            tensor = tensor if shape is None else tensor.view(*shape)
            return tensor.transpose(1, 2) if swap else tensor

        if not skip_output:
            out = out.view(call.batch, call.q_len, call.heads, call.v_dim).transpose(1, 2)
        mask = mask.view(*call.mask.shape) if mask is not None and call.mask else None
        return view(q, queries), view(k, keys), view(v, values), out, mask
