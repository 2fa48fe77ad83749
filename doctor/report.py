"""The doctor's findings as text, as JSON, and as a file for a bug report that says nothing about its user."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attention.machine import Device, Machine
from .diagnose import Diagnosis
from .trials import machine_as_json


@dataclass(frozen=True)
class Report:
    """Everything that one look at the machine found. `elsewhere`: rows of kernels that exist only inside ComfyUI."""

    machine: Machine
    device: Device
    diagnoses: Sequence[Diagnosis]
    outlook: Sequence[str] = ()
    remarks: Sequence[str] = ()
    elsewhere: Sequence[dict[str, Any]] = ()


def figure(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 10 else f"{milliseconds:.0f}"


def summary(one: Diagnosis) -> str:
    """The table's last column: one line."""
    verdict = one.verdict
    if verdict.works:
        error = f"error {verdict.error:.2g} ({verdict.allowed:.2g} allowed)" if verdict.error is not None else ""
        time = f"{figure(verdict.milliseconds)} ms ({verdict.timed})" if verdict.milliseconds is not None else ""
        return ", ".join(part for part in (error, time, f"{verdict.calls} calls compared") if part)
    if one.helpless:
        return one.cause
    if verdict.outcome == "not installed":
        return one.cause
    return verdict.detail.partition("\n")[0]


def _indented(text: str, by: str = "    ") -> str:
    return "\n".join(f"{by}{line}" for line in text.splitlines())


def _advice(names: Sequence[str], one: Diagnosis) -> str:
    """What to do about kernels that share one diagnosis."""
    lines = [f"{', '.join(names)}: {one.verdict.outcome}"]
    if one.cause:
        lines.append(f"  {one.cause}")
    if one.cure is not None:
        lines.append(f"  {one.cure.text}")
        if one.cure.command:
            lines.append(f"    {one.cure.command}")
    if one.advice:
        lines.append(f"  {one.advice}")
    sources = [source for source in (one.cause_source, one.cure.source if one.cure else "") if source]
    if sources:
        lines.append(f"  Source: {'; '.join(dict.fromkeys(sources))}")
    said = "\n".join(part for part in (one.verdict.detail if not one.verdict.reasons else "", one.verdict.raw) if part)
    if said:
        lines += ["  In its own words:", _indented(said)]
    return "\n".join(lines)


def _groups(diagnoses: Sequence[Diagnosis]) -> list[tuple[list[str], Diagnosis]]:
    """Kernels of one package for which the same is to be said are told together."""
    found: dict[Any, tuple[list[str], Diagnosis]] = {}
    for one in diagnoses:
        key = (one.kernel.package, one.verdict.outcome, one.cause, one.cure, one.advice, one.verdict.detail)
        key = key if not one.verdict.reasons else key[:-1]
        found.setdefault(key, ([], one))[0].append(one.kernel.name)
    return list(found.values())


# Of all that a package offers, what has to do with attention.
_ATTENTION = re.compile(r"attn|attention|^ops$|fmha", re.IGNORECASE)


def package_line(machine: Machine, name: str) -> str:
    """One package: its version, how it was built, its compiled parts, and what it offers for attention."""
    title, build = f"  {name} {machine.packages[name] or '(no version)'}", machine.builds.get(name)
    if build is None:
        return title
    built = ", ".join(part for part in (*build.built, build.wheel) if part)
    offered = [offer for offer in build.names if _ATTENTION.search(offer)]
    parts = [
        f"built for {built}" if built else "does not say how it was built",
        f"compiled: {', '.join(build.modules)}" if build.modules else "nothing compiled in it",
        f"offers {', '.join(offered)}" if offered else "offers nothing for attention by its name",
    ]
    return f"{title}: {'; '.join(parts)}"


def versions(machine: Machine) -> list[str]:
    """What the machine runs, in short."""
    return [
        f"PyTorch {machine.torch}",
        f"CUDA {machine.cuda}" if machine.cuda else "no CUDA",
        *([f"driver {machine.driver}"] if machine.driver else []),
        f"Triton {machine.triton}" if machine.triton else "no Triton",
        f"Python {machine.python}",
        f"{machine.system} {platform.machine()}",
    ]


def device_line(device: Device) -> str:
    return f"{device.name}: {device.title} ({device.kind}){f', {device.room}' if device.room else ''}"


def host_line(machine: Machine) -> str:
    """What ComfyUI does by itself; "" outside of it."""
    by = f", chosen by {machine.host_flag}" if machine.host_flag else ""
    return f"ComfyUI's own attention: {machine.host_attention or 'unknown'}{by}" if machine.host_attention or by else ""


def head(machine: Machine, device: Device) -> list[str]:
    """The machine in a few lines: devices, versions, what the host does by itself, packages."""
    others = [other for other in machine.devices if other.type != "cpu" and other.name != device.name]
    lines = [device_line(device), *(f"{device_line(other)} (not looked at here)" for other in others)]
    lines.append(", ".join(versions(machine)))
    lines += [line for line in [host_line(machine)] if line]
    packages = [name for name in sorted(machine.packages) if name != "triton"]
    return [
        *lines,
        "Attention packages:" if packages else "Attention packages: none",
        *(package_line(machine, name) for name in packages),
    ]


def as_text(report: Report) -> str:
    """One screen: the machine, a line for each kernel, what is best here, and what to do about what does not work."""
    lines = [*head(report.machine, report.device), *report.remarks, ""]
    rows = [(one.kernel.name, one.kernel.precision, one.verdict.outcome, summary(one)) for one in report.diagnoses]
    rows += [(row["name"], row["precision"], row["status"], "; ".join(row["reasons"])) for row in report.elsewhere]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        lines.append("  ".join([*cells, row[3]]).rstrip())
    lines += ["", *report.outlook]
    todo = [one for one in report.diagnoses if not one.helpless and (not one.verdict.works or one.advice)]
    for names, one in _groups(todo):
        lines += ["", _advice(names, one)]
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    """The same as data."""
    kernels = []
    for one in report.diagnoses:
        cure = one.cure
        kernels.append(
            {
                "name": one.kernel.name,
                "title": one.kernel.title,
                "precision": one.kernel.precision,
                "package": one.kernel.package,
                "version": one.version,
                "verdict": one.verdict.as_json(),
                "can_run_here": not one.helpless,
                "cause": {"text": one.cause, "source": one.cause_source},
                "cure": {"text": cure.text, "command": cure.command, "source": cure.source} if cure else None,
                "advice": one.advice,
            }
        )
    return {
        "machine": machine_as_json(report.machine),
        "device": report.device.name,
        "remarks": list(report.remarks),
        "outlook": list(report.outlook),
        "kernels": kernels,
        "elsewhere": list(report.elsewhere),
    }


_SECRET = r"(?:token|secret|password|passwd|api_?key|credential)"
_TOKENS = (
    r"\b(hf|ghp|gho|ghs|ghu|github_pat|glpat|sk|pk|xox[a-z]|pypi|nvapi|r8)[-_][\w-]{8,}",
    r"\bAKIA[0-9A-Z]{16}\b",
    r"\beyJ[\w-]+\.[\w-]+\.[\w-]*",
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",
    r"(?<=://)[^/\s:@]+(?=@)",
    r"(?i)(?<=bearer )\s*[\w.~+/=-]+",
    rf"(?i)(?<![a-z])(?:\w*{_SECRET}\w*)[\"']?\s*[=:]\s*[\"']?[^\s\"',;]+",
)
# On Windows a name may have spaces: what comes before the next backslash belongs to it.
_HOMES = (
    r"(?i)([a-z]:)?([\\/]+)(users|home|documents and settings)([\\/]+)[^\\/\s\"':;,]+"
    r"((?: [^\\/\s\"':;,]+){1,3}(?=\\))?"
)
_SHARE = r"(?i)(?<![^\s\"'=(,;])\\{2,4}(?:\?\\+UNC\\+)?(?![?.])[^\\/\s\"'<]+(?:\\+[^\\/\s\"'<]+|(?=<home>))"
_MAIL = r"[\w.+-]+@[\w-]+(\.[\w-]+)+"
# Names that many machines have, and that say nothing about anyone; some are words of the report.
_NOBODY = {
    "root", "user", "admin", "administrator", "ubuntu", "debian", "runner", "docker", "localhost", "desktop", "server",
    "comfy", "comfyui", "attune", "python", "torch", "pytorch", "cuda", "nvidia", "gpu", "linux", "windows",
}  # fmt: skip
_LETTERS = "A-Za-z0-9\u00c0-\u1fff"  # of scripts that put spaces between words
_NO_SPACES = "\u2e80"  # from here on Chinese, Japanese, Korean: a name stands in the middle of other letters


def _names() -> tuple[list[str], list[str]]:
    """(home folders, names of the user and the computer), longest first."""
    homes, names = {str(Path.home()), os.environ.get("USERPROFILE", ""), os.environ.get("HOME", "")}, set()
    names |= {os.environ.get(name, "") for name in ("USER", "USERNAME", "LOGNAME", "COMPUTERNAME", "HOSTNAME")}
    with contextlib.suppress(KeyError, OSError, ImportError):  # a user without a name
        names.add(getpass.getuser())
    names |= {socket.gethostname(), platform.node(), *(Path(home).name for home in homes if home)}
    names |= {name.partition(".")[0] for name in names}  # of a computer, without its domain
    plain = {home.rstrip("\\/") for home in homes if len(home) > 3}
    told = {name for name in names if name and name.lower() not in _NOBODY}
    return sorted(plain, key=len, reverse=True), sorted(told, key=len, reverse=True)


def _pattern(name: str) -> str:
    """Where `name` stands as a word; where it is too short to be told from other words, as a part of a path."""
    before = "" if name[0] >= _NO_SPACES else rf"(?<![{_LETTERS}])"
    after = "" if name[-1] >= _NO_SPACES else rf"(?![{_LETTERS}])"
    if len(name) < (3 if before or after else 2):
        before, after = r"(?<=[\\/])", r"(?![^\\/\s\"':;,)])"
    return f"{before}{re.escape(name)}{after}"


def scrub(value: Any, homes: Sequence[str] | None = None, names: Sequence[str] | None = None) -> Any:
    """`value` (text, or JSON data) without tokens, home folders, addresses, and names of users and computers.

    Keys of JSON data are words of the report, or of packages, and stay; what a key calls a secret is removed.
    """
    if homes is None or names is None:
        homes, names = _names()
    if isinstance(value, dict):
        return {
            key: "<removed>" if isinstance(part, str) and _is_secret(key) else scrub(part, homes, names)
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrub(part, homes, names) for part in value]
    if not isinstance(value, str):
        return value
    for pattern in _TOKENS:
        value = re.sub(pattern, "<removed>", value)
    value = re.sub(_MAIL, "<address>", value)
    for home in homes:
        slashes = r"[\\/]+".join(re.escape(part) for part in re.split(r"[\\/]+", home))
        value = re.sub(rf"(?<![\w.-]){slashes}(?![\w.-])", "<home>", value, flags=re.IGNORECASE)
    value = re.sub(_HOMES, "<home>", value)
    value = re.sub(_SHARE, "<share>", value)
    wanted = "|".join(["<(?:home|share|removed|address)>", *map(_pattern, names)])  # a user may be called "home"
    return re.sub(wanted, lambda found: found[0] if found[0][0] == "<" else "<name>", value, flags=re.IGNORECASE)


def _is_secret(key: Any) -> bool:
    return re.search(_SECRET, str(key), re.IGNORECASE) is not None
