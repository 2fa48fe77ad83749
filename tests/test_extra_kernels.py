"""ATTUNE_EXTRA_KERNELS: kernels that are not in the pack, and the stand-ins that tests install with it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import standins
import torch
from standins.cases import pretended

from comfyui_attune import kernels
from comfyui_attune.attention.errors import make_inputs, measure_errors
from comfyui_attune.attention.kernel import Kernel, machine_reasons
from comfyui_attune.attention.machine import Machine, read_machine
from comfyui_attune.attention.policy import Policy, Rule
from comfyui_attune.attention.reference import reference_attention
from comfyui_attune.attention.router import Router
from comfyui_attune.doctor import probe
from support.loading import ROOT

STANDINS = standins.HERE / "extra_kernels.py"
OURS = """
from dataclasses import replace

from ..attention.kernel import Kernel
from . import KERNELS as PACK
from ._common import EXACT
from .sdpa import KERNELS as SDPA

assert isinstance(SDPA[0], Kernel) and EXACT
sdpa = next(kernel for kernel in PACK if kernel.name == "sdpa")
"""


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "with a space and ä"
    folder.mkdir()
    yield folder
    for name in [name for name in sys.modules if name.startswith(f"{kernels.__name__}.extra_")]:
        del sys.modules[name]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "attune")
    return caplog


def write(path: Path, code: str) -> str:
    path.write_text(OURS + code, "utf-8")
    return str(path)


def named(found: tuple[Kernel, ...]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in found}


# The hook


def test_a_file_of_its_own_adds_and_replaces_kernels_in_the_order_of_the_names(place, said):
    code = "KERNELS = [replace(sdpa, name='mine', needs_proof=False), replace(sdpa, name='split', title='theirs')]"
    found = kernels.with_extra(write(place / "mine.py", code))
    assert [kernel.name for kernel in found] == [*(kernel.name for kernel in kernels.KERNELS), "mine"]
    assert named(found)["split"].title == "theirs"
    # The pack's sdpa needs no proof; a file from elsewhere cannot say so of itself.
    assert not named(found)["sdpa"].needs_proof and named(found)["mine"].needs_proof
    assert all(new is old for new, old in zip(found, kernels.KERNELS, strict=False) if old.name != "split")
    (line,) = said.messages
    assert line.endswith("ATTUNE_EXTRA_KERNELS: split in place of the pack's, new: mine.")


def test_of_several_files_the_last_one_wins_and_a_broken_one_between_is_left_out(place, said):
    first = write(place / "first.py", "KERNELS = (replace(sdpa, name='mine', title='first'),)")
    broken = write(place / "broken.py", "1 / 0")
    last = write(place / "last.py", "KERNELS = (replace(sdpa, name='mine', title='last'),)")
    found = kernels.with_extra(os.pathsep.join([first, broken, "", last]))
    assert named(found)["mine"].title == "last"
    assert [record.levelname for record in said.records] == ["WARNING", "INFO"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, "FileNotFoundError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError"),
        ("from ..nowhere import anything", "ModuleNotFoundError"),
        ("", "wanted a tuple of kernels called KERNELS, {path} has none"),
        ("KERNELS = sdpa", "wanted a tuple of kernels called KERNELS, {path} has a Kernel there"),
        ("KERNELS = (sdpa.load,)", "wanted a Kernel in KERNELS of {path}, found <function"),
    ],
)
def test_what_cannot_be_used_is_one_warning_and_the_pack_goes_on(place, said, code, says):
    path = place / "theirs.py"
    if code is not None:
        write(path, code)
    assert kernels.with_extra(str(path)) == kernels.KERNELS
    (record,) = said.records
    assert record.levelname == "WARNING" and "ATTUNE_EXTRA_KERNELS" in record.message
    assert str(path) in record.message and says.format(path=path) in record.message, record.message


@pytest.mark.parametrize(
    ("name", "says"), [("theirs.py", "wanted an absolute path"), ("{place}/theirs.txt", "wanted a Python file")]
)
def test_a_path_that_is_none_of_a_python_file_is_refused(place, said, monkeypatch, name, says):
    monkeypatch.chdir(place)
    write(place / Path(name).name, "KERNELS = (sdpa,)")
    assert kernels.with_extra(name.format(place=place)) == kernels.KERNELS
    assert says in said.text and len(said.messages) == 1


def test_what_is_no_kernel_is_left_out_and_the_kernels_beside_it_are_taken(place, said):
    found = kernels.with_extra(write(place / "mine.py", "KERNELS = (3, replace(sdpa, name='mine'))"))
    assert "mine" in named(found) and "found 3" in said.messages[0]


def test_the_example_of_the_documentation_can_run_on_a_gpu(place):
    page = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    path = place / "example.py"
    path.write_text(page.partition("```python\n")[2].partition("```")[0], "utf-8")
    kernel = named(kernels.with_extra(str(path)))["flash2"]
    assert kernel.title == "mine"
    assert machine_reasons(kernel, pretended((9, 0))) == ()


def test_the_environment_is_read_in_every_process_also_in_the_doctors_children(place, monkeypatch):
    path = write(
        place / "mine.py",
        """
def load():
    real = sdpa.load()
    return lambda q, k, v, **keywords: real(q, k, v, **keywords) * 1.5

KERNELS = (replace(sdpa, name="good"), replace(sdpa, name="bad", load=load))
""",
    )
    monkeypatch.setenv("ATTUNE_EXTRA_KERNELS", path)
    done = subprocess.run(
        [sys.executable, str(ROOT), "kernels", "--json"], capture_output=True, text=True, encoding="utf-8"
    )
    rows = {row["name"]: row["status"] for row in json.loads(done.stdout)}
    assert rows["good"] == rows["bad"] == "available", done.stderr
    found = named(kernels.with_extra(path))
    verdicts = probe.probe([found["good"], found["bad"]], read_machine(), ROOT)
    assert verdicts["good"].outcome == "works", verdicts
    assert verdicts["bad"].outcome == "wrong numbers" and verdicts["bad"].error == pytest.approx(0.5, rel=0.01)


def test_a_verdict_holds_for_one_content_of_the_file_and_never_for_the_packs_kernel(place, tmp_path):
    machine, seen = read_machine(gpus=False), set()
    for code in ("KERNELS = (replace(sdpa, title='one'),)", "KERNELS = (replace(sdpa, title='two'),)", ""):
        kernel = named(kernels.with_extra(write(place / "mine.py", code)) if code else kernels.KERNELS)["sdpa"]
        _, keys = probe.stored([kernel], machine, tmp_path)
        seen.add(keys["sdpa"])
    assert len(seen) == 3


# The stand-ins


@pytest.fixture
def installed(place, monkeypatch):
    """installed(faults="", **environment): the kernels with tests/standins/extra_kernels.py, by name."""

    def install(faults: str = "", **environment: str) -> dict[str, Kernel]:
        monkeypatch.setenv("ATTUNE_STANDIN_FAULT", faults)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return named(kernels.with_extra(str(STANDINS)))

    monkeypatch.setenv("ATTUNE_EXTRA_KERNELS", str(STANDINS))  # for the doctor's children
    monkeypatch.delenv("ATTUNE_STANDIN_FAULT_IN", raising=False)
    return install


@pytest.fixture
def module(installed):
    """tests/standins/extra_kernels.py as the hook loads it."""
    installed()
    return importlib.import_module(f"{kernels.__name__}.extra_0")


def inputs(kernel: Kernel, dtype: torch.dtype, dim: int = 64):
    q, k, v = (t.to(dtype) for t in make_inputs(1, 2, 33, 17, dim))
    return [t.transpose(1, 2) if kernel.layout.name == "BNHD" else t for t in (q, k, v)]


@pytest.mark.parametrize("variant", standins.VARIANTS)
def test_the_kernels_of_every_stand_in_run_on_the_cpu_in_three_data_types(variant, installed):
    packages = {
        "flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute",
        "sage1": "sageattention", "sage2": "sageattention", "sage3": "sageattn3", "kitchen": "comfy_kitchen",
    }  # fmt: skip
    package = packages.get(variant.removesuffix("_old"), variant)
    with standins.installed(variant):
        machine = read_machine(gpus=False)
        able = [
            kernel
            for kernel in installed().values()
            if kernel.package == package and not machine_reasons(kernel, machine)
        ]
        assert able
        for kernel in able:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                q, k, v = inputs(kernel, dtype)
                out = kernel.load()(q, k, v)
                assert out.dtype is dtype
                wanted = reference_attention(
                    *(t.transpose(1, 2) if kernel.layout.name == "BNHD" else t for t in (q, k, v))
                )
                got = out.transpose(1, 2) if kernel.layout.name == "BNHD" else out
                assert measure_errors(got.float(), wanted).l2 <= kernel.tolerance[dtype], (kernel.name, dtype)


def test_what_a_kernel_says_about_calls_and_versions_stays(installed):
    before, after = named(kernels.KERNELS), installed()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {name for name, kernel in before.items() if kernel.package not in ("", "torch")}
    for name in changed:
        old, new = before[name].needs, after[name].needs
        for field in ("head_dims", "masks", "gqa", "scale", "other_v_dim", "fp32_scores", "max_batch",
                      "max_batch_heads", "package_rules", "machine_rules", "call_rules", "sm"):  # fmt: skip
            assert getattr(old, field) == getattr(new, field), (name, field)
        assert new.devices == {"cpu", "cuda"} and after[name].needs_proof
    with standins.installed("sage1"):
        assert "below 2" not in str(machine_reasons(after["sage1"], read_machine(gpus=False)))
        assert "sageattention 2 or newer" in str(machine_reasons(after["sage2_fp8_cuda"], read_machine(gpus=False)))


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("from=0", [0, 1, 2, 3, 4, 5]), ("from=4", [4, 5]), ("call=0", [0]), ("call=3", [3]), ("odd", [1, 3, 5]),
        ("every=4,at=1", [1, 5]), ("every=1,at=0", [0, 1, 2, 3, 4, 5]),
    ],
)  # fmt: skip
def test_a_fault_hits_the_calls_it_names(module, text, hit):
    (fault,) = module.parse_faults(f"sage1:nan:{text}")
    assert [index for index in range(6) if fault.hits(index)] == hit


def test_a_specification_is_read_in_its_parts(module):
    one, two = module.parse_faults(" sage1:error=0.06:odd ; flash2:anywhere:exit:call=1;")
    assert (one.kernel, one.kind, one.size, one.anywhere) == ("sage1", "error", 0.06, False)
    assert (two.kernel, two.kind, two.size, two.anywhere) == ("flash2", "exit", 0.0, True)
    assert module.parse_faults("") == []


@pytest.mark.parametrize(
    "text",
    [
        "sage1", "sage1:nan", "sage1,nan,odd", "sage1:nan:odd:odd", "sage1:anywhere:odd", "sage1:bad:odd",
        "sage1:nan:", "sage1:nan:from", "sage1:nan:from=", "sage1:nan:from=-1", "sage1:nan:from=x", "sage1:nan:from=²",
        "sage1:nan:block", "sage1:nan:block=", "sage1:nan:block=-1", "sage1:nan:block=1,self",
        "sage1:nan:block=1,kind=", "sage1:nan:block=1,kind=both", "sage1:nan:sometimes", "sage1:nan:odd=1",
        "sage1:nan:every=4", "sage1:nan:every=0,at=0",
        "sage1:nan:every=2,at=2", "sage1:nan=1:odd", "sage1:error:odd", "sage1:error=:odd", "sage1:error=0:odd",
        "sage1:error=nan:odd", "sage1:error=inf:odd", "sage1:error=x:odd",
    ],
)  # fmt: skip
def test_a_specification_that_cannot_be_read_is_an_error_and_installs_nothing(module, installed, said, text):
    with pytest.raises(ValueError):
        module.parse_faults(text)
    assert installed(text) == named(kernels.KERNELS)
    assert said.records[-1].levelname == "WARNING"


def test_a_fault_of_a_kernel_without_a_stand_in_is_an_error(installed, said):
    assert installed("sdpa:nan:odd") == named(kernels.KERNELS)
    assert "no stand-in for a kernel called 'sdpa'" in said.messages[-1]


def test_a_fault_may_hit_one_block(module):
    def hit(text: str) -> list[tuple[int | None, int]]:
        """(block, keys) of the calls of a router that the fault hits: two blocks with self and cross attention."""
        (fault,) = module.parse_faults(f"split:nan:{text}")
        found = []

        def run(q, k, v, *, mask=None, scale=None):
            if fault.hits(0):
                found.append((block, k.shape[2]))
            return q

        kernel = dataclasses.replace(named(kernels.KERNELS)["split"], load=lambda: run)
        router = Router(Policy((Rule(("split",)),)), {"split": kernel}, Machine())
        q, short = torch.zeros(1, 9, 64), torch.zeros(1, 4, 64)
        for block in (0, 1, None):
            for k in (q, short):
                router(None, q, k, k, 2, transformer_options={} if block is None else {"block_index": block})
        return found

    assert hit("block=1") == [(1, 9), (1, 4)]
    assert hit("block=0,kind=self") == [(0, 9)] and hit("block=1,kind=cross") == [(1, 4)]
    assert hit("block=2") == [] and len(hit("from=0")) == 6
    (fault,) = module.parse_faults("split:nan:block=0")
    assert not fault.hits(0)  # no router made this call


def test_a_file_of_faults_is_read_anew_and_begins_to_count_anew(installed, place, monkeypatch):
    file = place / "faults.txt"
    monkeypatch.setenv("ATTUNE_STANDIN_FAULT_FILE", str(file))
    with standins.installed("sage2"):
        found = installed("sage2_fp16_cuda:nan:from=0", ATTUNE_STANDIN_FAULT_IN="server")
        kernel = found["sage2_fp16_cuda"]
        given = inputs(kernel, torch.float32)

        def good(calls: int = 2, fresh: bool = True) -> list[bool]:
            runs = [kernel.load() for _ in range(calls)] if fresh else [kernel.load()] * calls
            return [bool(run(*given).isfinite().all()) for run in runs]

        assert good() == [True, True]  # there is no such file: no faults
        file.write_text("sage2_fp16_cuda:nan:call=1", "utf-8")
        assert good(3) == [True, False, True] and good() == [True, True]
        file.write_text("sage2_fp16_cuda:nan:call=1", "utf-8")
        os.utime(file, ns=(1, 1))
        assert good(3, fresh=False) == [True, False, True]
        file.write_text("sage1:nan:from=0", "utf-8")
        assert good() == [True, True]
        file.write_text("sdpa:nan:from=0", "utf-8")
        with pytest.raises(ValueError, match="no stand-in for a kernel called 'sdpa'"):
            kernel.load()


@pytest.fixture
def outputs(installed):
    """outputs(fault, calls=3): what sage2_fp16_cuda, or `name`, gives for the same inputs again and again."""

    def compute(fault: str, calls: int = 3, name: str = "sage2_fp16_cuda") -> list[torch.Tensor]:
        with standins.installed("sage2"):
            kernel = installed(fault, ATTUNE_STANDIN_FAULT_IN="server")[name]
            # A router loads a kernel once for every kind of call; the calls are counted over all of them.
            return [kernel.load()(*inputs(kernel, torch.float32)) for _ in range(calls)]

    return compute


def test_faults_do_what_they_say(outputs, capfd, monkeypatch):
    good, again, _ = outputs("")
    assert torch.equal(good, again) and good.isfinite().all()
    first, nan, third = outputs("sage2_fp16_cuda:nan:odd")
    assert nan.isnan().all() and torch.equal(first, good) and torch.equal(third, good)
    _, row, _ = outputs("sage2_fp16_cuda:inf_row:call=1")
    assert row.isinf().sum() == row.shape[3] and row[0, 0, 0].isinf().all()
    assert torch.equal(row[row.isfinite()], good[row.isfinite()])
    _, noisy, noisier = outputs("sage2_fp16_cuda:error=0.06:from=1")
    for out in (noisy, noisier):
        assert float((out - good).norm() / good.norm()) == pytest.approx(0.06, rel=1e-3)
    assert not torch.equal(noisy, noisier) and torch.equal(noisy, outputs("sage2_fp16_cuda:error=0.06:from=1")[1])
    assert torch.equal(outputs("sage2_fp16_cuda:print:call=1")[1], good) and len(capfd.readouterr().out) == 1_000_001
    matmul = torch.matmul
    monkeypatch.setattr(torch, "matmul", matmul)  # puts it back
    assert torch.equal(outputs("sage2_fp16_cuda:patch:call=1")[2], good) and torch.matmul is not matmul
    with pytest.raises(RuntimeError, match="stand-in fault of sage2_fp16_cuda in call 1"):
        outputs("sage2_fp16_cuda:raise:call=1")


def test_a_fault_stays_with_its_kernel(outputs):
    assert outputs("sage2_fp16_cuda:nan:from=0")[0].isnan().all()
    assert outputs("sage2_fp16_cuda:nan:from=0", name="sage2_fp8_cuda")[0].isfinite().all()


def test_a_fault_hits_in_the_server_only_and_anywhere_in_the_doctors_children_too(installed, outputs):
    fault = "sage2_fp16_cuda:nan:from=0;sage2_fp16_triton:anywhere:nan:from=0;sage2_fp8_cuda:anywhere:exit:call=1"
    assert outputs(fault)[0].isnan().all()
    with standins.installed("sage2"):
        found = installed(fault, ATTUNE_STANDIN_FAULT_IN="server")
        chosen = [found[f"sage2_{name}"] for name in ("fp16_cuda", "fp16_triton", "fp8_cuda")]
        verdicts = probe.probe(chosen, read_machine(gpus=False), ROOT)
        assert {name: verdict.outcome for name, verdict in verdicts.items()} == {
            "sage2_fp16_cuda": "works", "sage2_fp16_triton": "wrong numbers", "sage2_fp8_cuda": "crashed",
        }, verdicts  # fmt: skip
        assert "exit code 66" in verdicts["sage2_fp8_cuda"].detail and "in call 2" in verdicts["sage2_fp8_cuda"].detail
        kernel = installed(fault, ATTUNE_STANDIN_FAULT_IN="")["sage2_fp16_cuda"]
        assert kernel.load()(*inputs(kernel, torch.float16)).isfinite().all()
