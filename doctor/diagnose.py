"""From verdicts to advice: a pure function. What is not known is said to be not known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..attention.kernel import Kernel
from ..attention.machine import Architecture, Device, Machine, first_choices
from .cures import Cure, Place, install, nothing_helps, triton
from .facts import ADVICE, CAUSES, Cause
from .kernel_verdict import KernelVerdict
from .speeds import PUBLISHED, SPEED_SOURCE, Published

UNKNOWN = "This error is not known to the doctor; its own words are below."
SUPERSEDED = Cure("Nothing has to be done: a newer version is there.")
_MEANING = {
    "wrong numbers": "It runs, and its results are wrong: pictures would be black, noise or subtly off.",
    "crashed": "It ends the process it runs in: ComfyUI would be gone, with no message.",
    "hung": "It does not come back: ComfyUI would stand still.",
    "undecided": "Nothing is known about this kernel: its probe was disturbed, or is still to come. Ask again later.",
}


@dataclass(frozen=True)
class Diagnosis:
    """One kernel: what was found, why, and what to do. `helpless`: no installation would change it."""

    kernel: Kernel
    version: str
    verdict: KernelVerdict
    cause: str = ""
    cause_source: str = ""
    cure: Cure | None = None
    advice: str = ""
    helpless: bool = False


def known_cause(kernel: Kernel, verdict: KernelVerdict) -> Cause | None:
    """What the error's own words are known to mean."""
    said = f"{verdict.detail}\n{verdict.raw}"
    for cause in CAUSES:
        if cause.packages and kernel.package not in cause.packages:
            continue
        if re.search(cause.pattern, said, re.IGNORECASE | re.DOTALL):
            return cause
    return None


def diagnose_one(
    kernel: Kernel, verdict: KernelVerdict, machine: Machine, place: Place, device: Device | None = None
) -> Diagnosis:
    """What is the matter with one kernel, and what to do about it."""
    device = device or machine.main_device
    version = machine.packages.get(kernel.package, machine.torch if kernel.package == "torch" else "")
    lasting = nothing_helps(kernel, machine, device)

    def answer(
        cause: str = "", source: str = "", cure: Cure | None = None, advice: str = "", helpless: bool = False
    ) -> Diagnosis:
        return Diagnosis(kernel, version, verdict, cause, source, cure, advice, helpless)

    if lasting:
        return answer("; ".join(lasting), kernel.url, Cure("No installation changes that."), helpless=True)
    advice = ADVICE.get(kernel.name, "")
    if verdict.works:
        return answer(advice=advice)
    if verdict.reasons:
        reasons = [reason for reason in verdict.reasons if not reason.startswith("package ")]
        cause = "; ".join(reasons) if verdict.outcome != "not installed" or reasons else "Its package is not installed."
        if all(reason.startswith("needs Triton") for reason in verdict.reasons):
            return answer(cause, kernel.url, triton(machine, place, device), advice)
        if re.search(r"\bbelow [\w.]+, installed is", cause):
            return answer(cause, kernel.url, SUPERSEDED)
        return answer(cause, kernel.url, install(kernel, machine, place, device), advice)
    known = None if verdict.outcome == "undecided" else known_cause(kernel, verdict)
    meaning = _MEANING.get(verdict.outcome, "")
    if known is None:
        cause = meaning if verdict.outcome in ("wrong numbers", "undecided") else f"{meaning} {UNKNOWN}".strip()
        if verdict.outcome == "wrong numbers":
            cause += " Why is not known."
        return answer(cause, advice=advice)
    cause = f"{meaning} {known.text}".strip()
    if known.name == "other_triton":
        return answer(cause, known.source, triton(machine, place, device), advice)
    if known.install:
        return answer(cause, known.source, install(kernel, machine, place, device, repair=True), advice)
    return answer(cause, known.source, Cure(known.cure, source=known.source) if known.cure else None, advice)


def diagnose(
    kernels: Iterable[Kernel],
    verdicts: Mapping[str, KernelVerdict],
    machine: Machine,
    place: Place,
    device: Device | None = None,
) -> list[Diagnosis]:
    """A diagnosis for each kernel, in the order of `kernels`."""
    return [diagnose_one(kernel, verdicts[kernel.name], machine, place, device) for kernel in kernels]


def _published(device: Device) -> Published | None:
    return next((one for one in PUBLISHED if one.capability == device.capability), None)


def _choice(diagnoses: Mapping[str, Diagnosis], names: Iterable[str], working: bool) -> str:
    """The first of `names` that works, or that could if it were installed."""
    for name in names:
        one = diagnoses.get(name)
        if one is not None and (one.verdict.works if working else not one.helpless):
            return name
    return ""


def _faster(times: float) -> str:
    return f"{times:.1f} times" if times > 1.05 else "no gain" if times > 0.95 else f"{times:.2f} times: slower"


def gains(diagnoses: Mapping[str, Diagnosis], now: str, device: Device) -> list[str]:
    """What the published speeds say about kernels that could work here and do not, against `now`: a line or two."""
    waiting = [
        name for name, one in diagnoses.items() if not one.helpless and not one.verdict.works and one.cure != SUPERSEDED
    ]
    figures = _published(device)
    if not waiting or figures is None:
        return [f"No published speeds are known for {device.sm or device.title}."] if waiting else []
    base = figures.speeds.get(now)
    known = [name for name in waiting if name in figures.speeds]
    if base is None or not known:
        return [f"No published speeds of {', '.join(waiting)} against {now} are known for {device.sm}."]
    known.sort(key=lambda name: -figures.speeds[name][1])
    told = [f"{name} {figures.speeds[name][1]} ({_faster(figures.speeds[name][1] / base[1])})" for name in known]
    return [
        f"What does not work here yet would reach, against {now} with {base[1]} TFLOPS or TOPS: {', '.join(told)}. "
        f"Published for {figures.gpu} ({device.sm}), 8K tokens, attention alone.",
        f"Source: {SPEED_SOURCE}.",
    ]


def outlook(diagnoses: Iterable[Diagnosis], machine: Machine, device: Device | None = None) -> list[str]:
    """Which kernel is expected to be best here, exact and fast, and what the others would gain: sentences."""
    device = device or machine.main_device
    by_name = {one.kernel.name: one for one in diagnoses}
    said, working = [], ""
    for fast in (False, True):
        names = first_choices(device.architecture, fast)
        best, now = _choice(by_name, names, working=False), _choice(by_name, names, working=True)
        working = working or now
        what = "fast (8-bit kernels allowed)" if fast else "exact"
        if not now:
            said.append(f"Best {what} on this device: none of {', '.join(names)} works here.")
        elif best == now:
            said.append(f"Best {what} on this device: {best}, which works.")
        else:
            said.append(f"Best {what} on this device: {best} ({by_name[best].verdict.outcome}); until then {now}.")
    return said + (gains(by_name, working, device) if working else [])


def remarks(machine: Machine, device: Device | None = None) -> list[str]:
    """What there is to say about the machine as a whole."""
    device = device or machine.main_device
    if device.architecture is not Architecture.CPU:
        return []
    if machine.main_device.type != "cpu":
        return ["This is about the CPU. The machine has a GPU as well."]
    if machine.cuda is None and machine.system != "Darwin":
        having = (
            f"As NVIDIA's driver {machine.driver} is here" if machine.driver else "If this machine has an NVIDIA GPU"
        )
        return [
            f"PyTorch {machine.torch} is built without CUDA and sees no GPU. {having}, "
            "install PyTorch for CUDA (pytorch.org/get-started/locally)."
        ]
    if machine.driver:
        return [
            f"NVIDIA's driver {machine.driver} is here, but PyTorch {machine.torch} sees no GPU: the driver may be too "
            f"old for CUDA {machine.cuda}, or CUDA_VISIBLE_DEVICES hides the GPU."
        ]
    return ["PyTorch sees no GPU here."]
