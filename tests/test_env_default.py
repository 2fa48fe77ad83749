"""`COMFYUI_ATTENTION_MECHANISM`: the default for everything that has no node."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from comfyui_attune.attention.machine import CPU, Architecture, Device, Machine
from comfyui_attune.attention.policy import Policy, Rule
from comfyui_attune.doctor import probe
from comfyui_attune.doctor.env_file import best_kernel, env_line, write_line
from comfyui_attune.doctor.kernel_verdict import KernelVerdict
from comfyui_attune.kernels import KERNELS
from support.loading import ROOT
from support.prompts import latent, node, selector, two_stage

BY_NAME = {kernel.name: kernel for kernel in KERNELS}
LINE = "export COMFYUI_ATTENTION_MECHANISM=sdpa"


@pytest.fixture
def default(comfy):
    """default(name): the default in force in this process until the end of the test."""
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.modules.diffusionmodules.model as vae

    from comfyui_attune.host import comfyui as host
    from comfyui_attune.host.default import Default

    applied = []

    def apply(name):
        applied.append(Default(name, host.kernels(), host.machine(), host.LINK, attention, vae))
        applied[-1].apply()
        return applied[-1]

    yield apply
    for one in applied:
        if one._installed is not None:
            one.remove()


def observed(default):
    return default.account()["observed"]


def test_every_function_of_the_host_is_routed_whoever_imported_it(default, comfy):
    import comfy.ldm.modules.attention as module
    from comfy.ldm.modules.attention import optimized_attention as imported_before

    q = torch.randn(1, 6, 32)
    expected = imported_before(q, q, q, 2)
    one = default("split")
    from comfy.ldm.modules.attention import optimized_attention_masked as imported_after

    small = module.optimized_attention_for_device(q.device, mask=True, small_input=True)
    for function in (imported_before, imported_after, small):
        assert torch.allclose(function(q, q, q, heads=2), expected, atol=1e-5)
    assert observed(one) == {"split": 3}


def test_vaes_are_routed_that_were_made_before_and_after(default, comfy):
    import comfy.ldm.modules.diffusionmodules.model as module

    def block():
        made = module.AttnBlock(32)
        for parameter in made.parameters():
            parameter.requires_grad_(False)
            torch.nn.init.normal_(parameter, std=0.1)
        return made

    torch.manual_seed(0)
    before = block()
    x = torch.randn(2, 32, 5, 3)
    expected = before(x)
    one = default("split")
    assert torch.allclose(before(x), expected, atol=1e-5)
    assert torch.isfinite(block()(x)).all()
    assert observed(one) == {"split": 2}
    one.remove()
    assert torch.equal(before(x), expected)


def test_removing_it_leaves_nothing_behind(default, comfy):
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.modules.diffusionmodules.model as vae

    from comfyui_attune.attention.session import current_router
    from comfyui_attune.host.trampoline import wrapped_cells

    def state():
        cells = {name: cell.cell_contents for name, cell in wrapped_cells(attention).items()}
        codes = {name: vars(vae)[name].__code__ for name in ("normal_attention", "pytorch_attention")}
        return cells, codes, set(vars(vae))

    clean = state()
    one = default("split")
    assert state() != clean and current_router(bare=True) is one.router
    one.remove()
    assert state() == clean and current_router(bare=True) is None


def test_a_node_on_the_model_wins(default, comfy):
    import comfy.ldm.modules.attention as module

    from comfyui_attune.attention.router import Router
    from comfyui_attune.attention.session import Forward, Session
    from comfyui_attune.host import comfyui as host

    one = default("split")
    router = Router(Policy((Rule(("basic",), source="1"),)), host.kernels(), host.machine(), host.LINK)
    session = Session(router)
    q = torch.randn(1, 6, 32)
    with Forward(router, session, frozenset({0})):
        module.optimized_attention(q, q, q, 2, transformer_options={"optimized_attention_override": router})
        module.optimized_attention(q, q, q, 2)
    assert session.record.observed() == {"basic": 2} and not observed(one)


def test_an_unknown_name_is_one_warning_with_the_names_and_no_change(comfy, caplog):
    from comfyui_attune.host.default import wanted_kernel

    assert wanted_kernel({"COMFYUI_ATTENTION_MECHANISM": "turbo"}) is None
    assert len(caplog.records) == 1 and "turbo" in caplog.text and "sage3_per_block_mean" in caplog.text
    assert wanted_kernel({"COMFYUI_ATTENTION_MECHANISM": " Flash3 "}) == "flash3"
    assert wanted_kernel({}) is wanted_kernel({"COMFYUI_ATTENTION_MECHANISM": ""}) is None


def test_the_start_up_block_ends_with_the_selected_mechanism(comfy):
    from comfyui_attune.host.default import summary

    gpu = Device("cuda:0", "NVIDIA GeForce RTX 5090", Architecture.BLACKWELL_CONSUMER, (12, 0), 32 * 2**30)
    machine = Machine(devices=(gpu, CPU), torch="2.9.0", cuda="12.8", packages={"sageattention": "2.2.0"},
                      host_attention="pytorch")  # fmt: skip
    lines = summary(machine, None)
    assert lines[0] == "GPU Configuration Summary"
    assert "cuda:0: NVIDIA GeForce RTX 5090 (Blackwell (consumer), sm_120), 32.0 GiB" in lines[1]
    assert "sageattention 2.2.0" in "\n".join(lines)
    assert lines[-1].strip().startswith("Selected Mechanism: host (ComfyUI's own, pytorch")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sage", "sage2_fp8_cuda_pp (COMFYUI_ATTENTION_MECHANISM=sage: its first choice that this machine can run; "),
        (
            "flash",
            "host (ComfyUI's own, pytorch; COMFYUI_ATTENTION_MECHANISM=flash cannot run here: none of its kernels",
        ),
        ("auto", "sdpa (COMFYUI_ATTENTION_MECHANISM=auto: its first choice that this machine can run; the doctor's "),
        ("auto_fast", "sage2_fp8_cuda_pp (COMFYUI_ATTENTION_MECHANISM=auto_fast: its first choice that"),
        (
            "flash2",
            "host (ComfyUI's own, pytorch; COMFYUI_ATTENTION_MECHANISM=flash2 cannot run here: package flash_attn",
        ),
        ("split", "split (COMFYUI_ATTENTION_MECHANISM; where it cannot run: ComfyUI's own, pytorch)"),
        ("basic", "basic (COMFYUI_ATTENTION_MECHANISM; where it cannot run: ComfyUI's own, pytorch)"),
        ("host", "host (COMFYUI_ATTENTION_MECHANISM=host: ComfyUI's own, pytorch)"),
    ],
)
def test_the_start_up_block_names_the_kernel_that_the_environment_comes_to(comfy, name, said):
    from comfyui_attune.host.default import summary

    gpu = Device("cuda:0", "NVIDIA GeForce RTX 5090", Architecture.BLACKWELL_CONSUMER, (12, 0), 32 * 2**30)
    machine = Machine(devices=(gpu, CPU), torch="2.9.0", cuda="12.8", triton="3.5.0", host_attention="pytorch",
                      packages={"sageattention": "2.2.0"})  # fmt: skip
    line = summary(machine, name)[-1]
    assert line.startswith(f"  Selected Mechanism: {said}") and "\n" not in line
    flagged = Machine(devices=(gpu, CPU), host_attention="sage", host_flag="--use-sage-attention")
    own = "ComfyUI's own, sage by --use-sage-attention"
    assert summary(flagged, "auto")[-1].endswith(f": host (COMFYUI_ATTENTION_MECHANISM=auto: {own})")


def test_in_a_real_server_text_encoder_vae_and_model_use_it_and_a_node_still_wins(make_server, server):
    """One server without the variable, one with it: the same video."""
    prompt = two_stage(lambda p, m, stage: selector(p, m, "20", "basic") if stage else m)
    prompt["30"] = node("VAELoader", vae_name="wan_2.1_vae.safetensors")
    prompt["31"] = node("VAEDecode", samples=["13", 0], vae=["30", 0])
    prompt["32"] = node("SaveImage", images=["31", 0], filename_prefix="tests/default")
    expected = latent(server.run(prompt))
    other = make_server(env={"COMFYUI_ATTENTION_MECHANISM": "split"})
    try:
        result = other.run(prompt)
        assert torch.allclose(latent(result), expected, atol=1e-4)
        assert [run["observed"] for run in result.runs] == [{"basic": 8}]
        log = other.output()
        assert "GPU Configuration Summary" in log
        assert "Selected Mechanism: split (COMFYUI_ATTENTION_MECHANISM" in log
        assert other.get("/attune/default")["observed"].get("split", 0) > 8
    finally:
        other.stop()
    assert "Selected Mechanism: host" in server.output()


def test_attune_env_prints_the_line_and_writes_only_its_own(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(ROOT), "env", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)

    if not torch.cuda.is_available():
        assert run().stdout.strip() == LINE
    file = tmp_path / "mit Leerzeichen é" / ".env_settings"
    assert run("--write", file).returncode == 1
    file.parent.mkdir()
    assert run("--write", file).returncode == 0
    assert file.read_text("utf-8").splitlines() == [run().stdout.strip()]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"{LINE}\n"),
        ("A=1", f"A=1\n{LINE}\n"),
        ("A=1\r\nB=2\r\n", f"A=1\r\nB=2\r\n{LINE}\r\n"),
        ("A=1\nexport COMFYUI_ATTENTION_MECHANISM=sage\nB=ä\n", f"A=1\n{LINE}\nB=ä\n"),
        ("COMFYUI_ATTENTION_MECHANISM=x\r\nB", f"{LINE}\r\nB"),
        ("# COMFYUI_ATTENTION_MECHANISM=x\n", f"# COMFYUI_ATTENTION_MECHANISM=x\n{LINE}\n"),
        ("MY_COMFYUI_ATTENTION_MECHANISM=x\n", f"MY_COMFYUI_ATTENTION_MECHANISM=x\n{LINE}\n"),
    ],
)
def test_a_file_keeps_everything_else(tmp_path, before, after):
    file = tmp_path / "env"
    file.write_bytes(before.encode("utf-8"))
    write_line(file, LINE)
    assert file.read_bytes().decode("utf-8") == after
    assert [path.name for path in tmp_path.iterdir()] == ["env"]


def test_a_file_that_is_no_text_is_left_as_it_is(tmp_path):
    file = tmp_path / "env"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnicodeDecodeError):
        write_line(file, LINE)
    assert file.read_bytes() == b"\xff\xfe\x00"


def test_the_best_kernel_is_none_that_the_doctor_found_bad(tmp_path, capsys):
    hopper = Device("cuda:0", "NVIDIA H200", Architecture.HOPPER, (9, 0))
    packages = {"flash_attn_interface": "3.0.0", "sageattention": "2.2.0"}
    machine = Machine((hopper, CPU), cuda="13.0", torch="2.11.0", triton="3.6.0", packages=packages)

    def best(fast=False, **outcomes):
        kernels = [BY_NAME[name] for name in outcomes]
        keys = probe.stored(kernels, machine, tmp_path / "empty")[1]
        kept = {name: {keys[name]: KernelVerdict(outcome)} for name, outcome in outcomes.items()}
        probe.store(tmp_path).update(lambda state: state.update(kept))
        return best_kernel(BY_NAME, machine, fast, tmp_path)

    assert best() == "flash3"
    assert "flash3 has not been tried here yet" in capsys.readouterr().err
    assert best(flash3="works") == "flash3" and capsys.readouterr().err == ""
    assert best(flash3="crashed") == "sdpa_cudnn"
    assert best(fast=True, sage2_fp8_cuda="wrong numbers", flash3="works") == "flash3"
    assert best(flash3="hung", sdpa_cudnn="unsupported") == "sdpa"
    assert best(sdpa="crashed") == "host"


def test_the_best_kernel_is_the_first_that_nothing_forbids():
    hopper = Device("cuda:0", "NVIDIA H200", Architecture.HOPPER, (9, 0))
    machine = Machine(devices=(hopper, CPU), cuda="13.0", torch="2.11.0")
    assert best_kernel(BY_NAME, machine, fast=False) == "sdpa_cudnn"
    with_flash = Machine(devices=(hopper, CPU), cuda="13.0", torch="2.11.0", packages={"flash_attn_interface": ""})
    assert best_kernel(BY_NAME, with_flash, fast=False) == "flash3"
    assert best_kernel(BY_NAME, Machine(), fast=True) == "sdpa"
    assert env_line("flash3") == "export COMFYUI_ATTENTION_MECHANISM=flash3"
