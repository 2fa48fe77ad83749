"""Prebuilt kernels of the Hugging Face Hub: what is offered, what was fetched, and whether it matches.

Nothing here uses the network; hub_fetch.py does. Names of builds and the rules that choose one: the package `kernels`
0.17.2 (kernels/variants.py, kernels/resolver.py), which must never be taken for this pack's folder of that name.
"""

from __future__ import annotations

import platform
import re
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..attention.machine import Fetched, offer_fetched
from .store import Store

PUBLISHER = "kernels-community"
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(Exception):
    """A kernel cannot be fetched; the text says why. Nothing was changed."""


@dataclass(frozen=True)
class Offer:
    """Where a kernel of ours is on the Hub, and the functions that its adapter calls."""

    repo: str
    functions: tuple[str, ...]


def _sage(*names: str) -> Offer:
    return Offer(f"{PUBLISHER}/sage-attention", tuple(f"sageattn_qk_int8_pv_{name}" for name in names))


# Not sage2_fp8_cuda_pp: the Hub's build tells no version, and one before 2.2.0 returns uninitialised memory for it.
OFFERS: dict[str, Offer] = {
    "flash2": Offer(f"{PUBLISHER}/flash-attn2", ("flash_attn_func",)),
    "flash3": Offer(f"{PUBLISHER}/flash-attn3", ("flash_attn_func",)),
    "flash4": Offer(f"{PUBLISHER}/flash-attn4", ("flash_attn_func",)),
    "sage2_fp16_triton": _sage("fp16_triton"),
    "sage2_fp16_cuda": _sage("fp16_cuda"),
    "sage2_fp8_cuda": _sage("fp8_cuda", "fp8_cuda_sm90"),
    "sage3": Offer(f"{PUBLISHER}/sage-attention", ("sageattn3_blackwell",)),
    "sage3_per_block_mean": Offer(f"{PUBLISHER}/sage-attention", ("sageattn3_blackwell",)),
}


def offer(name: str) -> Offer:
    """The offer called `name`. Raises HubError for other names, and for a repository of anybody else."""
    if name in OFFERS:
        return OFFERS[name]
    wanted = f"Wanted is one of {', '.join(OFFERS)}."
    publisher, slash, _ = name.partition("/")
    if slash and publisher != PUBLISHER:
        raise HubError(f"{publisher} is not a trusted publisher: code is fetched from {PUBLISHER} only. {wanted}")
    raise HubError(f"The Hub has no kernel for the name {name!r}. {wanted}")


@dataclass(frozen=True)
class Here:
    """What a build must match: torch and CUDA as "2.11" and "13.0", the system and CPU as the Hub writes them."""

    torch: str
    cuda: str | None
    system: str
    cpu: str
    free_threaded: bool = False


def here() -> Here:
    import torch

    system, cpu = platform.system().lower(), platform.machine()
    return Here(
        ".".join(torch.__version__.split(".")[:2]),
        torch.version.cuda,
        system,
        {"AMD64": "x86_64", "arm64": "aarch64"}.get(cpu, cpu),
        sys.version_info < (3, 15) and bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    )


_BUILD = re.compile(
    r"(?:torch-stable-abi(?P<abi>\d{2,})|torch(?P<torch>\d{2,})(?:-cxx(?:11|98))?|tvm-ffi\d+)"
    r"-(?P<backend>[a-z]+\d*)-(?P<cpu>\w+)-(?P<system>\w+)"
)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def mismatch(variant: str, here: Here) -> str:
    """Why the build `variant` cannot run here, "" where it can. Stricter nowhere than the package that loads it."""
    if found := re.fullmatch(r"torch-(\w+)", variant):
        wrong = {"cuda": here.cuda is None, "cpu": here.cuda is not None}.get(found[1], False)
        return f"it is built for {found[1].upper()}, torch here {_cuda_text(here)}" if wrong else ""
    found = _BUILD.fullmatch(variant)
    if found is None:
        return f"it is of a kind that is not known: {variant}"
    if here.free_threaded:
        return "it needs a Python with the global interpreter lock"
    if found["system"] != here.system or found["cpu"] != here.cpu:
        return f"it is built for {found['system']} on {found['cpu']}, this is {here.system} on {here.cpu}"
    for digits, exact in ((found["torch"], True), (found["abi"], False)):
        if digits is None:
            continue
        wanted = f"{digits[0]}.{digits[1:]}"
        if _number(wanted) > _number(here.torch) or (exact and wanted != here.torch):
            return f"it is built for torch {wanted}{'' if exact else ' or newer'}, this is torch {here.torch}"
    if cuda := re.fullmatch(r"cu(\d+)(\d)", found["backend"]):
        if here.cuda is None or int(cuda[1]) != _number(here.cuda)[0] or int(cuda[2]) > _number(here.cuda)[1]:
            return f"it is built for CUDA {cuda[1]}.{cuda[2]}, torch here {_cuda_text(here)}"
    elif found["backend"] == "cpu" and here.cuda is not None:
        return f"it is built for CPUs, torch here {_cuda_text(here)}"
    return ""


def _cuda_text(here: Here) -> str:
    return f"was built for CUDA {here.cuda}" if here.cuda else "was built without CUDA"


@dataclass(frozen=True)
class Record:
    """What was fetched for one kernel: enough to fetch the same again, and to find it."""

    repo: str
    revision: str
    variant: str
    licence: str
    size: int

    @property
    def place(self) -> str:
        """Its folder below the pack's folder for fetched kernels."""
        return f"{self.repo.partition('/')[2]}/{self.revision[:12]}-{self.variant}"


def records(home: Path) -> Store:
    """The file that says what was fetched: kernel name → Record."""

    def parse(data: Any) -> dict[str, Record]:
        found = {name: Record(**entry) for name, entry in (data or {}).items()}
        for record in found.values():
            texts = (record.repo, record.revision, record.variant, record.licence)
            if not all(isinstance(text, str) for text in texts) or not isinstance(record.size, int):
                raise ValueError(f"not a record: {record}")
        return found

    def dump(state: dict[str, Record]) -> dict[str, Any]:
        return {name: asdict(record) for name, record in state.items()}

    return Store(home / "fetched.json", "attune fetched kernels", 1, parse, dump)


def folder(home: Path, record: Record) -> Path:
    return home / "hub" / record.place


def fetched(home: Path, around: Here | None = None) -> dict[str, Fetched]:
    """What was fetched, for offer_fetched() of attention/machine.py. Builds that do not match come with the reason."""
    state: dict[str, Record] = records(home).read()
    around = around or (here() if state else None)
    found = {}
    for name, record in state.items():
        place, again = folder(home, record), f"`attune get {name}` fetches it anew"
        if name not in OFFERS or record.repo != OFFERS[name].repo or Path(record.variant).name != record.variant:
            why = f"the fetched kernel is said to come from {record.repo}, which is not where {name} is; {again}"
        elif (
            not COMMIT.fullmatch(record.revision) or not (place / "build" / record.variant / "metadata.json").is_file()
        ):
            why = f"the fetched kernel is no longer in {place}; {again}"
        elif around is not None and (wrong := mismatch(record.variant, around)):
            why = f"the fetched kernel does not match: {wrong}; {again}"
        else:
            why = ""
        found[name] = Fetched(str(place), why)
    return found


def announce(home: Path) -> None:
    """Tell this process what was fetched: read_machine() and the adapters know it from then on."""
    offer_fetched(fetched(home))
