"""Inputs of a benchmark: with the structure of real ones, new for each repeat, made on the device in little time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from ..attention.call import Layout
from ..attention.errors import InputKind, make_inputs
from .shapes import Shape

KINDS: tuple[InputKind, ...] = ("bias_k", "spike_k", "bias_v")
_BASE = 2**24  # numbers of one made tensor: it is made on the CPU, which takes a second for some 50 million
_TWICE = 2**30  # bytes above which one set of tensors is larger than any cache, and a second one is not needed

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class NoInputsError(ValueError):
    """A file holds no captured tensors that can be used."""


class Captured(NamedTuple):
    """Tensors of a real call, and the shape they have."""

    shape: Shape
    tensors: Tensors


def read_captured(path: Path) -> list[Captured]:
    """Tensors of a safetensors file: NAME.q, NAME.k and NAME.v (or q, k and v), each (B, H, tokens, D).

    Raises NoInputsError, or OSError where the file cannot be read at all.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise NoInputsError("captured tensors need the package safetensors, which ComfyUI brings") from None
    path.open("rb").close()  # its own words for a file that is not there are no help
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for key in sorted(file.keys()):
                name, _, part = key.rpartition(".")
                if part in ("q", "k", "v"):
                    found.setdefault(name or path.stem, {})[part] = file.get_tensor(key)
    except (SafetensorError, ValueError) as error:
        raise NoInputsError(f"{path} is no safetensors file ({error})") from None
    if not found:
        raise NoInputsError(f"{path} holds no tensors called q, k and v, or NAME.q, NAME.k and NAME.v")
    return [_captured(path, name, parts) for name, parts in found.items()]


def _captured(path: Path, name: str, parts: Mapping[str, torch.Tensor]) -> Captured:
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    fits = set(parts) == {"q", "k", "v"} and all(len(shape) == 4 and min(shape) > 0 for shape in shapes.values())
    if fits:
        q, k, v = (parts[part] for part in "qkv")
        fits = k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
        fits = fits and all(tensor.is_floating_point() for tensor in (q, k, v))
    if not fits:
        raise NoInputsError(
            f"{path}: {name!r}: wanted q (B, H, N, D) and k, v (B, H, M, D) of one floating-point type, found {shapes}"
        )
    shape = Shape(f"captured {name}", q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])
    return Captured(shape, (q, k, v))


class Inputs:
    """q, k and v of one shape and dtype on a device, in memory order (B, N, H, D) as models have them.

    A few heads of each kind of structure are made from `seed`; the others, and each repeat, are the same tokens rolled
    along: other numbers in other places, for the price of a copy. Keys and values are rolled together, so the result
    stays that of real attention. Two sets of tensors take turns where one could be in a cache.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0, captured: Tensors | None = None
    ) -> None:
        self.shape, self.kinds = shape, ("captured",) if captured else KINDS
        batch, heads, q_len, kv_len, dim = shape.numbers
        self._base: dict[str, Tensors] = {}
        if captured:
            self._base["captured"] = _in_memory_order(captured, dtype, device)
        else:
            few = max(1, min(heads, _BASE // (max(q_len, kv_len) * dim)))
            for number, kind in enumerate(KINDS):
                made = make_inputs(1, few, q_len, kv_len, dim, kind=kind, seed=seed + number)
                self._base[kind] = _in_memory_order(made, dtype, device)
        sizes = ((batch, q_len, heads, dim), (batch, kv_len, heads, dim), (batch, kv_len, heads, dim))
        size = sum(batch * tokens * heads * dim for batch, tokens, heads, dim in sizes) * dtype.itemsize
        self._sets = [
            tuple(torch.empty(size, dtype=dtype, device=device) for size in sizes)
            for _ in range(1 if size > _TWICE else 2)
        ]
        self._turn = count()
        self.begin()

    def begin(self) -> None:
        """Start over: what comes is the same for every kernel."""
        self._turn = count()
        self.fresh()

    def fresh(self) -> None:
        """Bring in the next inputs, of the next kind of structure."""
        turn = next(self._turn)
        self.fill(self.kinds[turn % len(self.kinds)], turn)

    def fill(self, kind: str, turn: int = 0) -> None:
        """Bring in inputs of one kind; the same `turn` gives the same numbers."""
        self._now = self._sets[turn % len(self._sets)]
        base = self._base[kind]
        batches, few = base[0].shape[0], base[0].shape[2]
        batch, heads = self.shape.batch, self.shape.heads
        for item in range(batch):
            for first in range(0, heads, few):
                last = min(first + few, heads)
                for place, (target, source) in enumerate(zip(self._now, base, strict=True)):
                    tokens = source.shape[1]
                    # A prime step per repeat, head group and batch item; k and v take the same one.
                    step = 31 * turn + 7 * (first // few) + 13 * item + 17 * (place == 0) * turn
                    part = source[item % batches, :, : last - first]
                    target[item, :, first:last].copy_(part.roll(step % tokens, dims=0))

    def bhnd(self) -> Tensors:
        """What was brought in last, as (B, H, tokens, D): views."""
        q, k, v = (tensor.transpose(1, 2) for tensor in self._now)
        return q, k, v

    def for_kernel(self, layout: Layout) -> Tensors:
        """What was brought in last, in a kernel's layout: views."""
        q, k, v = self._now
        return (q, k, v) if layout is Layout.BNHD else self.bhnd()


def input_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """What Inputs hold on the device at the most, and the output."""
    batch, heads, q_len, kv_len, dim = shape.numbers
    one = batch * heads * dim * (q_len + 2 * kv_len) * dtype.itemsize
    base = len(KINDS) * min(one, 3 * max(_BASE, max(q_len, kv_len) * dim) * dtype.itemsize)
    return one * (1 if one > _TWICE else 2) + base + batch * heads * q_len * dim * dtype.itemsize


def _in_memory_order(tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensors:
    q, k, v = (tensor.transpose(1, 2).to(device, dtype).contiguous() for tensor in tensors)
    return q, k, v
