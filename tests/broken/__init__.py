"""Attention packages that go wrong when they are imported; `make` writes them into a folder on the path.

The kinds are what users report (KERNELS.md §2) and what a package could do at worst.
"""

import shutil
import textwrap
from pathlib import Path

# What stands at the top of the package. {name} is its import name.
CODE = {
    "missing module": 'raise ImportError("libcudart.so.12: cannot open shared object file: No such file or directory")',
    "schema": """
        raise RuntimeError(
            "flash_attn::_flash_attn_forward: expected the aten::_flash_attention_forward schema to return rng_state, "
            "unused but got philox_seed, philox_offset"
        )
    """,
    "dll": 'raise OSError("[WinError 127] DLL load failed while importing {name}: a procedure was not found")',
    "exit": "import sys\nsys.exit(-1)",
    "os exit": 'import os, sys\nprint("CUDA error: no kernel image", file=sys.stderr, flush=True)\nos._exit(1)',
    "segfault": "import ctypes\nctypes.string_at(0)",
    "loop": "while True:\n    pass",
    "loop in C": "import ctypes\nctypes.PyDLL(None).sleep(600)",  # with the interpreter's lock held
    "memory": 'held = []\nwhile True:\n    held.append(bytearray(b"x") * (32 << 20))',
    "chatter": 'for _ in range(200):\n    print("x" * 100_000, flush=True)',
    "search path": 'import sys\nsys.path.insert(0, "/nowhere/of/{name}")',
    "patches torch": "import torch\nreal = torch.matmul\ntorch.matmul = lambda *args, **others: real(*args, **others)",
    "grandchild": """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("grandchild", child.pid, flush=True)
        while True:
            pass
    """,
    "needs flash_attn": "try:\n    import flash_attn\nexcept ImportError:\n    pass",
    "signature": "",
    "fine": "",
}
# What the host takes from each package.
TAIL = {
    "sageattention": "def sageattn(q, k, v, attn_mask=None, **kwargs): raise NotImplementedError",
    "sageattn3": "def sageattn3_blackwell(q, k, v, **kwargs): raise NotImplementedError",
    "flash_attn": "def flash_attn_func(q, k, v, **kwargs): raise NotImplementedError",
    "xformers": "_has_cpp_library = False",
}
UNREADABLE = """
class Sage:
    __signature__ = "a native function that inspect cannot read"

    def __call__(self, *args):
        raise NotImplementedError

sageattn = Sage()
"""


def make(folder: Path, package: str, kind: str, version: str = "9.9.1") -> Path:
    """Write `package` of that kind, with its metadata, into `folder`; returns `folder`. An older one is replaced."""
    place = folder / package
    place.mkdir(parents=True, exist_ok=True)
    tail = UNREADABLE if kind == "signature" else TAIL[package]
    code = textwrap.dedent(CODE[kind]).replace("{name}", package).strip()
    (place / "__init__.py").write_text(f"{code}\n{tail}\n", "utf-8")
    if package == "xformers":
        (place / "ops.py").write_text("def memory_efficient_attention(q, k, v, **kwargs): raise NotImplementedError\n")
    for old in folder.glob(f"{package}-*.dist-info"):
        shutil.rmtree(old)
    metadata = folder / f"{package}-{version}.dist-info"
    metadata.mkdir()
    name = package.replace("_", "-")
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    (metadata / "top_level.txt").write_text(f"{package}\n", "utf-8")
    return folder


def make_torch(folder: Path) -> Path:
    """Write an empty torch into `folder`, so that children need no seconds for the real one."""
    place = folder / "torch"
    place.mkdir(parents=True, exist_ok=True)
    (place / "__init__.py").write_text("def matmul(a, b): raise NotImplementedError\n", "utf-8")
    return folder
