"""Triton's own launcher without a GPU: kernels are compiled for one, and a libcuda of ours writes launches down.

It changes this process for good, so it belongs into a child: `use(folder)` before the first kernel is compiled.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("no_gpu_cuda.c")
_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8}
# For skipif: why it cannot be had here, or "".
WHY_NOT = "" if importlib.util.find_spec("triton") else "Triton is not installed; it has no wheels for this system"
WHY_NOT = WHY_NOT or ("" if shutil.which("gcc") and os.name == "posix" else "needs gcc, as Triton's launcher does")


class Launched(NamedTuple):
    """A launch as the driver saw it. `parameters`: their bytes; `function`: which of the kernels of that name."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: bytes
    function: int


class NoGPU:
    """Stands in for one GPU of a compute capability. `launches()` gives those since it was last called."""

    def __init__(self, folder: Path, capability: tuple[int, int]) -> None:
        import triton
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, include_dirs

        library = folder / "libcuda.so.1"
        include = f"-I{include_dirs[0]}"
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", include, str(SOURCE)]
        subprocess.run([*command, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # later ones find it by its name
        self._library.take_launches.restype = ctypes.c_size_t
        self._names: dict[int, str] = {}
        os.environ.update(TRITON_LIBCUDA_PATH=str(folder), TRITON_CACHE_DIR=str(folder / "cache"))

        class Launcher(CudaLauncher):
            def __init__(launcher, source: Any, metadata: Any) -> None:
                super().__init__(source, metadata)
                self._expect(metadata.name, source.signature)

        driver = CudaDriver()
        driver.launcher_cls = Launcher
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda _device: 0
        driver.get_device_capability = lambda _device: capability
        triton.runtime.driver.set_active(driver)

    def _expect(self, name: str, signature: dict[Any, str]) -> None:
        sizes: list[int] = []
        for kind in signature.values():
            if kind.startswith("*"):
                sizes.append(8)
            elif kind.startswith("tensordesc"):
                rank = re.search(r"\[([^]]*)\]", kind)[1].count(",") + 1  # type: ignore[index]
                sizes += [128, *[4] * rank, *[8] * rank]
            elif kind != "constexpr":
                sizes.append(_SIZES[kind])
        sizes += [8, 8]  # scratch memory, of which there is none
        number = self._library.expect_function(name.encode(), len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        assert number >= 0, "more kernels than the stand-in has room for"
        self._names[number] = name

    def launches(self) -> list[Launched]:
        room = (ctypes.c_int64 * (1 << 16))()
        taken = self._library.take_launches(room, len(room))
        found, place = [], 0
        while place < taken:
            number, x, y, z, threads, shared, size = room[place : place + 7]
            words = (size + 7) // 8
            parameters = bytes(memoryview(room).cast("B")[(place + 7) * 8 :][:size])
            found.append(Launched(self._names[number], (x, y, z), threads, shared, parameters, number))
            place += 7 + words
        return found
