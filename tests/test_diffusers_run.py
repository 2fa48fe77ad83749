"""attune run: a script as it is, with its pipelines patched."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from support.loading import ROOT

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

HEAD = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "docs" / "examples")!r})
import tiny_pipelines as pipelines
"""


@pytest.fixture
def run(tmp_path):
    """run(text of a script, *arguments): the finished process of `attune run` on it."""

    def run(text, *arguments, env=None, kernel="split"):
        script = tmp_path / "a skript ä.py"
        script.write_text(HEAD + textwrap.dedent(text), "utf-8")
        command = [sys.executable, "-W", "ignore", str(ROOT), "run", str(script), *arguments]
        if kernel:
            command[5:5] = ["--kernel", kernel]
        around = {**os.environ, "ATTUNE_HOME": str(tmp_path / "home"), "PYTHONUTF8": "1", **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=around, check=False)

    return run


def test_every_pipeline_of_a_script_is_patched_and_reported(run):
    done = run(
        """
        import gc
        for make in (pipelines.sd15, pipelines.flux):
            pipe, call = make()
            print(type(pipe).__name__, tuple(pipelines.result(pipe, call).shape), __name__)
            del pipe
            gc.collect()
        print(sys.argv[1:], os.path.basename(sys.argv[0]), os.path.basename(__file__))
        """,
        "--steps",
        "2",
        "two words",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "StableDiffusionPipeline (1, 3, 32, 32) __main__",
        "FluxPipeline (1, 3, 16, 16) __main__",
        "['--steps', '2', 'two words'] a skript ä.py a skript ä.py",
    ]
    assert "Ran: split ×17" in done.stderr and "Ran: split ×7" in done.stderr


def test_the_kernel_may_stand_behind_the_script(run):
    text = "pipe, call = pipelines.wan(); pipelines.result(pipe, call); print(sys.argv[1:])"
    done = run(text, "--kernel", "sdpa_math", "x", kernel="")
    assert "['x']" in done.stdout and "Ran: sdpa_math ×26" in done.stderr
    done = run("print(sys.argv[1:])", "--kernel", "mine", kernel="sdpa")
    assert done.stdout == "['--kernel', 'mine']\n"
    assert "made no diffusers pipeline" in done.stderr


def test_exit_status_and_errors_are_the_scripts(run):
    assert run("sys.exit(7)").returncode == 7
    done = run("pipe, call = pipelines.sd15(); pipe(**{**call, 'height': 33})")
    assert done.returncode == 1
    assert "ValueError" in done.stderr and ": failed" in done.stderr


def test_what_is_wrong_with_the_command(run, tmp_path):
    done = run("print('ran')", kernel="sage9")
    assert done.returncode == 2 and "sdpa_efficient" in done.stderr and not done.stdout
    command = [sys.executable, str(ROOT), "run", str(tmp_path / "none.py")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and "there is no script" in done.stderr


def test_switched_off_the_script_runs_as_it_is(run):
    done = run("pipe, call = pipelines.sd15(); pipelines.result(pipe, call); print('done')", env={"ATTUNE": "off"})
    assert done.returncode == 0 and done.stdout == "done\n" and "Ran:" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a single process")
def test_an_interrupt_reaches_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped', flush=True)\n    raise SystemExit(3)\n"
    )
    env = {**os.environ, "ATTUNE_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT), "run", str(script)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "stopped\n"
    assert process.returncode == 3


def test_a_flash_attn_of_another_schema_does_not_take_the_script_down(run, tmp_path):
    """R3: importing it raises, and diffusers with it; in quarantine it is as if it were not installed."""
    folder = tmp_path / "site" / "flash_attn"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "raise RuntimeError(\"Current Torch with Flash-Attention 2.5.7 doesn't have a compatible "
        'aten::_flash_attention_forward schema")\n'
    )
    info = tmp_path / "site" / "flash_attn-2.5.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.5.7\n")
    (info / "RECORD").write_text("")
    env = {"PYTHONPATH": str(tmp_path / "site")}
    done = run("pipe, call = pipelines.wan(); print(pipelines.result(pipe, call).shape)", env=env)
    assert done.returncode == 0, done.stderr
    assert "flash_attn 2.5.7 is in quarantine" in done.stderr or "in quarantine" in done.stderr
    assert "Ran: split ×26" in done.stderr


EXAMPLES = {
    "stable_diffusion_controlnet.py": ["Ran: split ×25", "The same picture but for rounding"],
    "wan22.py": ["not installed", "Ran: sdpa ×26", "5 frames of 16 × 16"],
    "controlvideo_like.py": ["Before: RuntimeError: CUDA error: invalid argument", "Ran: sdpa ×17", "xformers"],
}


def test_the_examples_run(tmp_path):
    assert set(EXAMPLES) | {"tiny_pipelines.py", "controlvideo_modules.py"} == {
        path.name for path in (ROOT / "docs" / "examples").glob("*.py")
    }
    bootstrap = (
        "import importlib.util, runpy, sys\n"
        f"root = {str(ROOT)!r}\n"
        "spec = importlib.util.spec_from_file_location('comfyui_attune', root + '/__init__.py', "
        "submodule_search_locations=[root])\n"
        "sys.modules['comfyui_attune'] = package = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(package)\n"
        "sys.path.insert(0, root + '/docs/examples')\n"
        f"for name in {list(EXAMPLES)!r}:\n"
        "    runpy.run_path(root + '/docs/examples/' + name, run_name='__main__')\n"
        "    print('=====')\n"
    )
    env = {**os.environ, "ATTUNE_HOME": str(tmp_path), "PYTHONUTF8": "1"}
    command = [sys.executable, "-W", "ignore", "-c", bootstrap]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, check=False)
    assert done.returncode == 0, done.stderr
    for (name, said), text in zip(EXAMPLES.items(), done.stdout.split("====="), strict=False):
        for words in said:
            assert words in text, name


def stand_in(fault):
    """The environment in which flash2 is there, on the CPU, and goes wrong."""
    standins = ROOT / "tests" / "standins"
    return {
        "ATTUNE_EXTRA_KERNELS": str(standins / "extra_kernels.py"),
        "PYTHONPATH": str(standins / "flash2"),
        "ATTUNE_STANDIN_FAULT": fault,
        "ATTUNE_STANDIN_FAULT_IN": "server",
    }


FLUX = "pipe, call = pipelines.flux(); print(float(pipelines.result(pipe, call).sum()))"


def test_a_named_kernel_is_proved_in_a_child_process_and_healed_where_it_fails(run):
    done = run(FLUX, env=stand_in("flash2:nan:from=3"), kernel="flash2")
    assert done.returncode == 0, done.stderr
    assert "waiting for the verdict on flash2: it is tried in a child process" in done.stderr
    assert "forward(s) were thrown away and done again" in done.stderr
    assert "flash2 gave NaN or infinity" in done.stderr
    plain = run(FLUX, kernel="host")
    assert abs(float(done.stdout) - float(plain.stdout)) < 0.5


def test_a_kernel_that_ends_the_process_is_never_called_in_the_script(run):
    done = run(FLUX, env=stand_in("flash2:anywhere:exit:from=0"), kernel="flash2")
    assert done.returncode == 0, done.stderr
    assert "the doctor found: crashed" in done.stderr and "Ran: host ×7" in done.stderr
