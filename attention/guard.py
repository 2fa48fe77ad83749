"""Is a forward pass healthy: are its attention outputs finite, and near enough to float32 where the kernel is lossy?

While the model computes nothing is read from the device: each call leaves a few numbers there, and `Watch.read`
fetches all of them at once, one synchronisation per forward.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from .call import AttentionCall

if TYPE_CHECKING:
    from .route import Route

log = logging.getLogger("attune")
ROWS = 128  # queries that a sample compares
_SAMPLE_BYTES = 64 * 2**20  # what a sample may allocate for the scores of several heads at once
_EVERY = 8  # forwards in which one call is compared, once every route was
NOT_FINITE = "gave NaN or infinity"


class Limit(NamedTuple):
    """How far a kernel's output may be from float32: a relative error, `l1` (Σ|d|/Σ|ref|) or `l2` (‖d‖/‖ref‖)."""

    figure: Literal["l1", "l2"]
    value: float


@dataclass(frozen=True, slots=True)
class Place:
    """The calls that a kernel failed for, told apart by block, kind and shape: plain data, kept on disk as well."""

    block: int | None
    kind: str
    q_len: int
    kv_len: int
    heads: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, call: AttentionCall) -> Place:
        dtype = str(call.dtype).removeprefix("torch.")
        return cls(call.block, call.kind, call.q_len, call.kv_len, call.heads, call.head_dim, dtype)

    def __str__(self) -> str:
        block = "a block with no number" if self.block is None else f"block {self.block}"
        return f"{block} ({self.kind} attention, {self.q_len:,} × {self.kv_len:,} tokens)"


@dataclass(frozen=True, slots=True)
class Finding:
    """A kernel that did not do its work, where, and what was wrong in a few words."""

    kernel: str
    place: Place
    reason: str


@dataclass(frozen=True, slots=True)
class Sample:
    """The measured error of one call, against float32."""

    route: Route
    l1: float
    l2: float

    @property
    def beyond(self) -> str:
        """Why this error is too large; "" where it is not."""
        limit = self.route.limit
        if limit is None:
            return ""
        found = self.l1 if limit.figure == "l1" else self.l2
        # NaN: the reference is zero. Infinite: that is not an error but a broken output, and is found as such.
        if not math.isfinite(found) or found <= limit.value:
            return ""
        return f"was off by {found:.2g} (relative {limit.figure.upper()} against float32), allowed: {limit.value:.2g}"


def sample_bytes(call: AttentionCall) -> int:
    """What `sample_error` allocates for such a call, at most."""
    width = _width(call.q_len, call.kv_len, call.head_dim, call.v_dim)
    return max(width, min(call.heads * width, _SAMPLE_BYTES))


def _width(q_len: int, kv_len: int, dim: int, v_dim: int) -> int:
    """Bytes of one head: scores, weights and a mask of the sampled rows, and keys and values, in float32."""
    return 4 * kv_len * (3 * min(ROWS, q_len) + dim + v_dim)


def sample_error(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """(Σ|d|, Σ|ref|, Σd², Σref²) of random query rows of one batch item, on the tensors' device; reads nothing.

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), out (B, H, N, Dv); the mask has four dimensions and
    broadcasts, True may attend. The reference is float32 over all keys, a few heads at a time.
    """
    batch, heads, q_len, dim = q.shape
    groups, kv_len = heads // k.shape[1], k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    rows = torch.randint(q_len, (min(ROWS, q_len),), generator=generator, device=q.device)
    item = int(torch.randint(batch, (1,), generator=torch.Generator().manual_seed(generator.initial_seed())))
    step = max(1, min(heads, _SAMPLE_BYTES // _width(q_len, kv_len, dim, v.shape[-1])))
    sums = torch.zeros(4, device=q.device, dtype=torch.float32)
    if mask is not None:
        mask = mask[item if mask.shape[0] > 1 else 0]
        if mask.shape[1] > 1:
            mask = mask[:, rows]
    for first in range(0, heads, step):
        chosen = slice(first, min(first + step, heads))
        keys = torch.arange(heads, device=q.device)[chosen] // groups if groups > 1 else chosen
        scores = q[item, chosen][:, rows].float() @ k[item, keys].float().mT * scale
        if mask is not None:
            here = mask[chosen] if mask.shape[0] > 1 else mask
            scores = scores.masked_fill(~here, -math.inf) if here.dtype is torch.bool else scores + here.float()
        lost = scores.amax(-1, keepdim=True).eq(-math.inf)  # a query that may attend to nothing has no right answer
        reference = (scores.softmax(-1) @ v[item, keys].float()).masked_fill(lost, 0.0)
        difference = (out[item, chosen][:, rows].float() - reference).masked_fill(lost, 0.0)
        parts = (difference.abs(), reference.abs(), difference.square(), reference.square())
        sums += torch.stack([part.sum() for part in parts])
    return sums


def figures(sums: Sequence[float]) -> tuple[float, float]:
    """(l1, l2) of what `sample_error` left."""
    l1, all1, l2, all2 = sums
    return (l1 / all1, math.sqrt(l2 / all2)) if all1 > 0 and all2 > 0 else (math.nan, math.nan)


class Sampler:
    """Compares calls of a run with float32: the first of each route, then a random one in every eighth forward."""

    def __init__(self) -> None:
        self._random = random.Random(0)  # its own: a run's seed must give the same picture with and without it
        self._calls = 0  # calls with a limit in a forward, the most there were so far
        self._number = 0
        self._compared: set[tuple[str, Place]] = set()

    def knows(self, route: Route) -> bool:
        """Was a call like those of this route compared before, by the same kernel?"""
        return route.call is not None and (route.name, Place.of(route.call)) in self._compared

    def begin_anew(self) -> None:
        """A kernel that was good is not any more: compare everything once more."""
        self._compared.clear()

    def choose(self) -> int:
        """Which call with a limit, counted from 0, is compared in the forward that begins now; mostly there is none."""
        return self._random.randrange(_EVERY * self._calls or 1)

    def ended(self, calls: int) -> None:
        self._calls = max(self._calls, calls)

    def measure(
        self,
        route: Route,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor | None:
        """`sample_error` of one call in the host's layouts; None where the route has no limit, or it cannot be had."""
        route.compared = True
        if route.limit is None or route.call is None:
            return None
        self._compared.add((route.name, Place.of(route.call)))
        self._number += 1
        try:
            generator = torch.Generator(q.device).manual_seed(self._number)
            return sample_error(*route.plainly(q, k, v, mask, out), route.scale, generator)
        except RuntimeError as error:  # too little memory, most likely: nothing that may cost a run
            log.debug("A call of %s could not be compared with float32: %s", route.name, error)
            return None


class Health(NamedTuple):
    """What a forward's calls left: was all of it finite, and the errors that were measured."""

    finite: bool
    samples: tuple[Sample, ...] = ()

    @property
    def good(self) -> bool:
        return self.finite and not any(sample.beyond for sample in self.samples)


class Watch:
    """Collects what one forward leaves on the device, and reads it once at its end."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._chosen = sampler.choose()
        self._limited = 0
        self._sums: list[torch.Tensor] = []
        self._samples: list[tuple[Route, torch.Tensor]] = []
        self.kernels: dict[str, None] = {}

    def see(
        self,
        route: Route,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        out: torch.Tensor,
    ) -> Finding | None:
        """Take note of one call's output, in the host's layouts. Always None: nothing is known yet."""
        self.kernels[route.name] = None
        # In float32: a sum of finite float16 numbers may be infinite in float16.
        self._sums.append(out.sum(dtype=torch.float32))
        if route.limit is not None:
            if not route.compared or self._limited == self._chosen:
                sums = self._sampler.measure(route, q, k, v, mask, out)
                if sums is not None:
                    self._samples.append((route, sums))
            self._limited += 1
        return None

    def read(self, out: Any = None) -> Health:
        """The health of the forward that gave `out`. The one synchronisation, and none where nothing was seen."""
        if not self._sums:
            return Health(True)
        self._sampler.ended(self._limited)
        last = [out.sum(dtype=torch.float32)] if isinstance(out, torch.Tensor) and out.is_floating_point() else []
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for tensor in (*self._sums, *last):
            by_device.setdefault(tensor.device, []).append(tensor)
        # A sum of finite numbers is finite, one with NaN or infinity in it is not, and neither is the sum of sums.
        finite = [torch.stack(tensors).sum() for tensors in by_device.values()]
        packed: dict[torch.device, list[torch.Tensor]] = {}
        for tensor in (*finite, *(sums for _, sums in self._samples)):
            packed.setdefault(tensor.device, []).append(tensor.reshape(-1))
        numbers: dict[torch.device, list[float]] = {
            device: torch.cat(tensors).tolist() for device, tensors in packed.items()
        }
        healthy = all(math.isfinite(numbers[tensor.device].pop(0)) for tensor in finite)
        samples = []
        for route, sums in self._samples:
            mine = numbers[sums.device]
            samples.append(Sample(route, *figures(mine[:4])))
            del mine[:4]
        return Health(healthy, tuple(samples))
