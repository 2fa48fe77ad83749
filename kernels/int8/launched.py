"""What keeps a call's cost to the CPU small: compiled kernels launched directly, and one allocation for all buffers.

Triton's own launch looks at each argument to find out which compiled kernel it needs, 10 µs and more. A model repeats
its calls with other addresses only, so what was found for one call holds for the next of the same shapes and strides.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNED = 256  # bytes; tensor descriptors want 16, the tensor cores' loads are happier with whole lines


class Launch:
    """A kernel with everything but its tensors: the first call goes through Triton, later ones launch what that gave.

    fixed: the arguments behind the tensors, in order. constants: the constexprs, which come last, in order. repeats:
    whoever calls promises that tensors have the same types, and addresses divisible by 16, in every call.
    """

    __slots__ = (
        "_behind",
        "_constants",
        "_fixed",
        "_front",
        "_grid",
        "_kernel",
        "_options",
        "_plain",
        "_repeats",
        "_run",
        "_stream",
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        fixed: tuple[Any, ...],
        constants: dict[str, Any],
        repeats: bool,
        **options: int,
    ) -> None:
        self._kernel, self._grid, self._options = kernel, grid, options
        self._fixed, self._constants = fixed, constants
        self._behind = (*fixed, *constants.values())
        self._repeats = repeats and isinstance(kernel, triton.JITFunction)
        self._run: Any = None

    def __call__(self, *tensors: Any) -> None:
        """tensors: anything with `dtype` and `data_ptr()`, and tensor descriptors."""
        if self._run is None:
            compiled = self._kernel[self._grid](*tensors, *self._fixed, **self._constants, **self._options)
            if self._repeats and compiled is not None:  # None: a hook of Triton's has kept it from being compiled
                self._keep(compiled)
        elif nobody_profiles():
            self._plain(*self._grid, self._stream(), *self._front, *tensors, *self._behind)
        else:  # somebody profiles
            self._run(*tensors, *self._behind)

    def _keep(self, compiled: Any) -> None:
        """As Triton 3.4 to 3.6 launch, in CompiledKernel.__getitem__; without what they look up each time."""
        driver = triton.runtime.driver.active
        self._stream = functools.partial(driver.get_current_stream, driver.get_current_device())
        self._plain = compiled.run
        self._front = compiled.function, compiled.packed_metadata, None, None, None
        self._run = compiled[self._grid]


def nobody_profiles() -> bool:
    """No hook of Triton's is to be told of launches. A hook is a function or None, from 3.5 on a chain of functions."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not getattr(enter, "calls", enter) and not getattr(leave, "calls", leave)


class Part:
    """A buffer within a larger one: all that Triton asks of a tensor."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address


class Described(TensorDescriptor):
    """A tensor descriptor without Triton's checks, which cost microseconds: those of its first call hold for all."""

    def __init__(self, base: Any, shape: Sequence[int], strides: Sequence[int], block_shape: list[int]) -> None:
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape


class Buffers:
    """Several buffers in one allocation. shapes: (shape, dtype) of each."""

    __slots__ = ("_interpreted", "_places", "bytes")

    def __init__(self, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], interpreted: bool) -> None:
        self._interpreted = interpreted
        self._places: list[tuple[int, int, tuple[int, ...], torch.dtype]] = []
        offset = 0
        for shape, dtype in shapes:
            size = torch.Size(shape).numel() * dtype.itemsize
            self._places.append((offset, offset + size, shape, dtype))
            offset += -(-size // _ALIGNED) * _ALIGNED
        self.bytes = offset

    def parts(self, room: torch.Tensor) -> list[Any]:
        """The buffers in `room`, (bytes) of uint8, which has to outlive the launches. The interpreter takes tensors."""
        if self._interpreted:
            return [room[first:end].view(dtype).view(shape) for first, end, shape, dtype in self._places]
        address = room.data_ptr()
        return [Part(address + first, dtype) for first, _, _, dtype in self._places]
