"""Compile a Triton kernel for a GPU that is not here, and tell what the compiler made of it.

A case is what one compiled variant needs: `Case`. `measure(case, target)` gives a report that is plain data. Needs
Triton with the tools of its Linux wheels (ptxas, cuobjdump, nvdisasm), and no GPU.
"""

from __future__ import annotations

import collections
import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MATRIX = re.compile(r"\b((?:[HIQ]G?|UTC[HIQ]?)MMA)\b")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
BRANCH = re.compile(r"BRA.*?`\((\.L_x_\d+)\)")
# Products of e4m3, and those that start from zero: Ada's and consumer Blackwell's, Hopper's, Blackwell's.
E4M3 = re.compile(r"\bQG?MMA\.\S*E4M3|\bUTCQMMA\b")
FRESH = re.compile(r"\bQG?MMA\.\S*E4M3.*, RZ\b|\bUTCQMMA\b.*, !UPT\b")
NARROW = re.compile(r"\b(?:LDG|STG|LDGSTS)\.\S*\b[US](?:8|16)\b")
OPCODE = re.compile(r"\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z0-9_]+)((?:\.[A-Z0-9_]+)*)")
IN_PTX = re.compile(r"(wgmma\.mma_async\.[\w.]+|mma\.sync\.[\w.]+|tcgen05\.mma\.[\w.:]+)")
# Of these the first suffixes say what is done.
DETAILED = {"MUFU", "F2FP", "I2FP", "I2F", "SHFL"}


@dataclass(frozen=True)
class Case:
    """A @triton.jit function with the types of its arguments, as Triton writes them ("*i8", "i32", "fp32").

    `constants` are its constexprs and arguments known to be one number, `divisible` those known to be multiples of 16,
    `options` what the compiler takes ("num_warps", "num_stages").
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)


def compile_case(case: Case, target: str) -> Any:
    """Triton's compiled kernel for `target` ("sm_90"). Raises whatever Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, signature=signature, constexprs=case.constants, attrs=divisible)
    capability = int(target.removeprefix("sm_"))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)


def _run_tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def main_loop(assembly: list[str]) -> list[str]:
    """The longest stretch that branches back to its beginning, has a matrix instruction and does not end the kernel."""
    labels = {found[1]: place for place, line in enumerate(assembly) if (found := LABEL.match(line))}
    loops = []
    for place, line in enumerate(assembly):
        found = BRANCH.search(line)
        if found and labels.get(found[1], place) < place:
            body = assembly[labels[found[1]] : place + 1]
            if any(MATRIX.search(each) for each in body) and not any("EXIT" in each for each in body):
                loops.append(body)
    return max(loops, key=len, default=[])


def describe_loop(body: list[str]) -> dict[str, Any]:
    """What the loop is made of; see `measure` for the fields."""
    mix: collections.Counter[str] = collections.Counter()
    order: list[str] = []
    for line in body:
        found = OPCODE.search(line)
        if not found:
            continue
        name, suffix = found.groups()
        mix[name + (".".join(suffix.split(".")[:3]) if name in DETAILED else "")] += 1
        if MATRIX.match(name):
            order.append("M")
        elif name == "MUFU" and ".EX2" in suffix:
            order.append("E")
        elif name == "WARPGROUP" and "DEPBAR" in line:
            order.append("W")
    runs = ((kind, len(list(same))) for kind, same in itertools.groupby(order))
    return {
        "instructions": mix.total(),
        "spills": mix["LDL"] + mix["STL"],
        "overlapped": overlapped(order),
        "e4m3": sum(bool(E4M3.search(line)) for line in body),
        "fresh": sum(bool(FRESH.search(line)) for line in body),
        "order": " ".join(f"{kind}{count}" if count > 1 else kind for kind, count in runs),
        "mix": dict(sorted(mix.items(), key=lambda entry: (-entry[1], entry[0]))),
    }


def overlapped(order: list[str]) -> int:
    """How many exponentials stand between a matrix instruction that runs by itself and the wait for it."""
    if "W" not in order:
        return 0  # such instructions do not exist there, or Triton does not use them
    count, in_flight = 0, False
    for kind in order:
        in_flight = kind == "M" or (in_flight and kind == "E")
        count += in_flight and kind == "E"
    return count


def measure(case: Case, target: str, keep: Path | None = None) -> dict[str, Any]:
    """What the compiler made of a case.

    registers, stack (bytes) per thread; shared (bytes), warps per program; matrix: the instructions that PTX names;
    narrow: instructions that read or write less than 4 bytes of global memory per thread; loop: instructions, spills
    (local loads and stores), order of matrix instructions (M), exponentials (E) and waits (W), overlapped (see above),
    e4m3: products of that type, fresh: those of them that start from zero, mix. With `keep`, PTX, TTGIR and SASS are
    left in that folder.
    """
    compiled = compile_case(case, target)
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        assembly = _run_tool("nvdisasm", "-c", str(cubin))
        usage = _run_tool("cuobjdump", "-res-usage", str(cubin))
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.-]+", "_", f"{case.name} {target}")
        for suffix, text in (("ptx", compiled.asm["ptx"]), ("ttgir", compiled.asm["ttgir"]), ("sass", assembly)):
            (keep / f"{stem}.{suffix}").write_text(text, "utf-8")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump tells no registers of {case.name} for {target}: {usage[-200:]!r}")
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "narrow": sum(bool(NARROW.search(line)) for line in assembly.splitlines()),
        "matrix": sorted(set(IN_PTX.findall(compiled.asm["ptx"]))),
        "loop": describe_loop(main_loop(assembly.splitlines())),
    }
