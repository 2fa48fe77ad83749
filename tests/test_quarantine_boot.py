"""A real ComfyUI with broken attention packages: without the pack it dies, with it it starts, serves and samples.

Every way to be broken is tried as each of the four packages that ComfyUI imports, on a first boot. A boot takes a
dozen seconds, so each has all four packages, broken in four ways; over all boots every pair occurs once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import standins
from broken import make

from attune_devtools.host import Host
from attune_devtools.say import Stop
from support.prompts import latent, rule, two_stage

SMALL = {"size": 32}
QUARANTINED = re.compile(r"Attune: (\S+) \S+ is in quarantine, to ComfyUI it is not installed: (.*)")
PROBED = "in child processes, because"

# As they are imported: does the package have to be kept out, and does the host's flag for it have to go?
IMPORTED = {
    "missing module": (False, True),
    "chatter": (False, False),
    "search path": (False, False),
    "patches torch": (False, False),
    "schema": (True, True),
    "dll": (True, True),
    "exit": (True, True),
    "os exit": (True, True),
    "segfault": (True, True),
    "memory": (True, True),
}
# When they are called, in the words of standins/extra_kernels.py: what the doctor says of them.
CALLED = {
    "nan:from=0": "wrong numbers",
    "error=0.5:from=0": "wrong numbers",
    "exit:call=1": "crashed",
    "print:from=0": "works",
    "patch:from=0": "works",
}
KINDS = [*IMPORTED, *CALLED]
# Each package: its place in the square, the flag that makes ComfyUI use it, a stand-in of it, one of its kernels.
PACKAGES = {
    "sageattention": (0, "--use-sage-attention", "sage2", "sage2_fp16_cuda"),
    "flash_attn": (5, "--use-flash-attention", "flash2", "flash2"),
    "sageattn3": (10, "", "sage3", "sage3"),
    "xformers": (3, "", "xformers", "xformers"),
}
VERSIONS = {"sageattention": "2.2.0", "flash_attn": "2.8.3.post2", "sageattn3": "1.0.0", "xformers": "0.0.35"}
ROWS = [
    {package: KINDS[(row + place[0]) % len(KINDS)] for package, place in PACKAGES.items()} for row in range(len(KINDS))
]
# A flag goes with a package that is broken at import: with the flag the host itself calls it, past every verdict. Those
# pairs of flag and kind that are not here are in test_quarantine.py, without a ComfyUI.
FLAGS = ["flash_attn"] * 5 + ["sageattention"] * 5 + ["flash_attn"] * 5
# What ends a ComfyUI without the pack. It takes any exception from xformers. "memory" would, with the machine.
DEADLY = [
    *((package, kind) for package in PACKAGES for kind in ("os exit", "segfault")),
    *((package, kind) for package in PACKAGES if package != "xformers" for kind in ("schema", "dll", "exit")),
    ("sageattention", "missing module"), ("flash_attn", "missing module"), ("sageattention", "signature"),
]  # fmt: skip
MINUS_1 = 255 if os.name != "nt" else 0xFFFFFFFF
ENDS = {
    "schema": "exit code 1; .*philox_seed",
    "dll": "exit code 1; .*DLL load failed",
    "exit": f"exit code {MINUS_1}",
    "os exit": "exit code 1",
    "segfault": "exit code -11" if os.name != "nt" else "exit code",
    "missing module": f"exit code (1|{MINUS_1})",
    "signature": "exit code 1; .*(native function|invalid signature)",
    "loop": "did not answer within",
}


def on_path(*folders: Path) -> str:
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH", "")]))


def test_every_package_is_broken_in_every_way_once():
    pairs = [pair for row in ROWS for pair in row.items()]
    assert len(pairs) == len(set(pairs)) == len(PACKAGES) * len(KINDS)
    assert all(row[flagged] in IMPORTED for row, flagged in zip(ROWS, FLAGS, strict=True))
    flagged = {(package, row[package]) for row, package in zip(ROWS, FLAGS, strict=True)}
    assert {kind for _, kind in flagged} == set(IMPORTED)


# Without the pack


@pytest.fixture(scope="module")
def plain(comfyui_folder, tmp_path_factory):
    """plain(package, kind, seconds): how a ComfyUI without the pack ends with that package."""

    def start(package: str, kind: str, seconds: float = 120) -> str:
        folder = tmp_path_factory.mktemp("plain")
        flags = ["--cpu", "--disable-all-custom-nodes"]
        flags += [PACKAGES[package][1]] if kind == "missing module" else []
        env = {"PYTHONPATH": on_path(make(folder / "site", package, kind))}
        host = Host(Path(sys.executable), comfyui_folder, folder, flags, env=env)
        try:
            host.start(seconds)
        except Stop as stopped:
            return str(stopped)
        finally:
            host.stop()
        return "it started"

    return start


@pytest.fixture(scope="module")
def ends(plain):
    """How a ComfyUI without the pack ends, as a future for each pair of DEADLY; two ran at a time."""
    with ThreadPoolExecutor(2) as pool:
        return {pair: pool.submit(plain, *pair) for pair in DEADLY}


@pytest.mark.parametrize(("package", "kind"), DEADLY)
def test_a_comfyui_without_the_pack_dies_of_it(ends, package, kind):
    said = ends[package, kind].result()
    assert re.search(ENDS[kind], said), said


def test_a_comfyui_without_the_pack_hangs_in_a_loop(plain):
    with ThreadPoolExecutor(len(PACKAGES)) as pool:
        for said in pool.map(lambda package: plain(package, "loop", 20), PACKAGES):
            assert re.search(ENDS["loop"], said), said


# With the pack


@pytest.fixture(scope="module")
def clean(server):
    """The latent of the prompt with the host's own attention and none of these packages."""
    return latent(server.run(two_stage(**SMALL)))


def broken(folder: Path, kinds: dict[str, str]) -> dict[str, str]:
    """Install the packages, broken in those ways; the environment of a ComfyUI with them and a state of its own."""
    site, variants, faults = folder / "site ä", [], []
    for package, kind in kinds.items():
        _, _, variant, kernel = PACKAGES[package]
        if kind in CALLED:
            variants.append(standins.HERE / variant)
            faults.append(f"{kernel}:anywhere:{kind}")
        else:
            make(site, package, kind, VERSIONS[package])
    return {
        "PYTHONPATH": on_path(site, *variants),
        "ATTUNE_HOME": str(folder / "state"),
        "ATTUNE_EXTRA_KERNELS": str(standins.HERE / "extra_kernels.py"),
        "ATTUNE_STANDIN_FAULT": ";".join(faults),
    }


def outcomes(folder: Path) -> dict[str, list[str]]:
    """The outcomes for each package in the quarantine's file."""
    file = folder / "state" / "quarantine.json"
    if not file.exists():
        return {}
    verdicts = json.loads(file.read_text("utf-8"))["state"]["verdicts"]
    return {name: [verdict["outcome"] for verdict in kept.values()] for name, kept in verdicts.items()}


def sample(server, kernels: list[str]):
    """A prompt whose stages name these kernels, one each, or the first in both."""
    named = [kernels[0], kernels[-1]] if kernels else ["auto", "auto"]
    return server.run(
        two_stage(lambda prompt, model, stage: rule(prompt, model, str(20 + stage), named[stage]), **SMALL)
    )


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[", ".join(row.values()) for row in ROWS])
def test_with_the_pack_it_starts_on_a_first_boot_serves_and_samples(make_server, clean, tmp_path, row):
    kinds, flagged = ROWS[row], FLAGS[row]
    called = [package for package, kind in kinds.items() if kind in CALLED]
    server = make_server(PACKAGES[flagged][1], env=broken(tmp_path, kinds), folder=f"row-{row}")
    result = sample(server, [PACKAGES[package][3] for package in called])
    said = server.output()
    server.stop()
    # It samples, and right.
    assert (latent(result) - clean).abs().max() < 1e-3 * clean.abs().max()
    # What would end it is kept out, and the flag goes with it.
    imported = {package: IMPORTED[kind] for package, kind in kinds.items() if kind in IMPORTED}
    assert {name for name, _ in QUARANTINED.findall(said)} == {name for name, (hidden, _) in imported.items() if hidden}
    assert bool(re.search(f"flag {PACKAGES[flagged][1]} was cleared", said)) is imported[flagged][1]
    assert said.count(PROBED) == 1 and "PRESTARTUP FAILED" not in said
    # What goes wrong when it is called is called only where it does no harm.
    for stage, run in enumerate(result.runs):
        if called:
            package = (called[0], called[-1])[stage]
            good = CALLED[kinds[package]] == "works"
            assert set(run["observed"]) == ({PACKAGES[package][3]} if good else {"host"}), run
            assert good or f"the doctor found: {CALLED[kinds[package]]}" in run["nodes"][str(20 + stage)]["text"]


def test_with_the_pack_it_starts_with_four_that_never_end_and_then_tries_only_what_has_changed(
    make_server, clean, tmp_path
):
    env = broken(tmp_path, dict.fromkeys(PACKAGES, "loop"))
    for boot in ("loop", "signature"):
        make(tmp_path / "site ä", "sageattention", boot, VERSIONS["sageattention"])
        known = {package for package, found in outcomes(tmp_path).items() if found == ["hung"]}
        server = make_server("--use-sage-attention", env=env, folder=f"boot-{boot}")
        result = sample(server, [])
        said = server.output()
        server.stop()
        assert (latent(result) - clean).abs().max() < 1e-3 * clean.abs().max()
        assert {name for name, _ in QUARANTINED.findall(said)} == set(PACKAGES)
        assert "The flag --use-sage-attention was cleared" in said
        # On a machine so slow that nothing is known about a loop, it is hidden all the same but tried again.
        (tried,) = re.findall(rf"importing (.*) {PROBED}", said)
        assert set(re.findall(r"(\w+) \d\S*", tried)) == set(PACKAGES) - known | {"sageattention"}
