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
from broken import make

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


MODULAR = """
import torch
from diffusers import UNet2DConditionModel
from diffusers.modular_pipelines import ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam

class Denoise(ModularPipelineBlocks):
    model_name = "tiny"

    @property
    def expected_components(self):
        return [ComponentSpec("unet", UNet2DConditionModel)]

    @property
    def inputs(self):
        return [InputParam("sample")]

    @property
    def intermediate_outputs(self):
        return [OutputParam("noise")]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        block.noise = components.unet(block.sample, 1, torch.ones(1, 3, 16)).sample
        self.set_block_state(state, block)
        return components, state

pipe = Denoise().init_pipeline()
pipe.register_components(unet=pipelines.sd15()[0].unet)
print(type(pipe).__name__, tuple(pipe(sample=torch.ones(1, 4, 8, 8), output="noise").shape))
"""


def test_a_modular_pipeline_is_patched_once_it_has_its_models(run):
    done = run(MODULAR)
    assert done.stdout == "ModularPipeline (1, 4, 8, 8)\n", done.stderr
    assert "ModularPipeline (UNet2DConditionModel)" in done.stderr and "Ran: split" in done.stderr


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


AS_PYTHON = """
import multiprocessing, os, sys, threading, time
import __main__

class Tee:
    def write(self, text):
        os.write(1, text.encode())

    def flush(self):
        pass

def late():
    threading.main_thread().join()
    print(sys.modules["__main__"] is __main__, flush=True)

def double(number):
    return 2 * number

if __name__ == "__main__":
    os.chdir("..")
    print(sys.argv, __file__, sys.path[0], vars(__main__) is globals(), sys.stdin.read(), flush=True)
    threading.Thread(target=late).start()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [1, 2]), flush=True)
"""


@pytest.mark.parametrize(
    "end", ["sys.exit('a text ä')", "raise KeyboardInterrupt", "sys.stdout = Tee(); print('teed')", "1 / 0"]
)
def test_a_script_runs_as_python_runs_it(end, tmp_path):
    folder = tmp_path / "a földer"
    folder.mkdir()
    (folder / "a skript ä.py").write_text(f"{AS_PYTHON}    {end}\n", "utf-8")
    env = {**os.environ, "ATTUNE_HOME": str(tmp_path / "home"), "PYTHONUTF8": "1"}
    found = []
    for command in ([], [str(ROOT), "run", "--kernel", "sdpa"]):
        done = subprocess.run(
            [sys.executable, *command, "a skript ä.py", "--kernel", "x", "two words"], capture_output=True, text=True,
            encoding="utf-8", env=env, cwd=folder, input="typed", check=False,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if line and not line.startswith("attune run:")]
        found.append((done.returncode, done.stdout, said[-1:]))
    assert found[1] == found[0]
    assert "[2, 4]" in found[0][1] and "typed" in found[0][1]


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


def on_path(*folders):
    """PYTHONPATH with these folders in front."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def broken_flash_attn(tmp_path):
    """R3: the environment with a flash-attn for another torch, and an xformers: diffusers cannot be imported there."""
    make(tmp_path / "site", "flash_attn", "schema", "2.5.7")
    return {"PYTHONPATH": on_path(make(tmp_path / "site", "xformers", "needs flash_attn"))}


def test_a_flash_attn_of_another_schema_does_not_take_the_script_down(run, broken_flash_attn):
    text = "pipe, call = pipelines.wan(); print(pipelines.result(pipe, call).shape)"
    before = run(text, env={**broken_flash_attn, "ATTUNE_QUARANTINE": "off"})
    assert before.returncode == 1 and "_flash_attention_forward schema" in before.stderr
    done = run(text, env=broken_flash_attn)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("flash_attn 2.5.7 is in quarantine, to this program it is not installed") == 1
    assert "Ran: split ×26" in done.stderr


BY_IMPORT = f"""
import importlib.util, sys
def load():
    root = {str(ROOT)!r}
    spec = importlib.util.spec_from_file_location(
        "comfyui_attune", root + "/__init__.py", submodule_search_locations=[root])
    sys.modules["comfyui_attune"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
"""
PIPELINE = "from diffusers import FluxPipeline"


@pytest.mark.parametrize(
    ("text", "works"),
    [
        (PIPELINE, False),
        (f"load()\nimport transformers\n{PIPELINE}", True),
        (f"sys.modules['attune_doctor'] = None\nload()\n{PIPELINE}", False),  # ComfyUI's start has decided already
    ],
)
def test_importing_the_pack_first_lets_diffusers_be_imported(text, works, broken_flash_attn, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BY_IMPORT + text, "utf-8")
    env = {**os.environ, **broken_flash_attn, "ATTUNE_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, check=False)
    assert (done.returncode == 0) is works, done.stderr
    if works:
        assert done.stderr.count("flash_attn 2.5.7 is in quarantine") == 1
    else:
        assert "_flash_attention_forward schema" in done.stderr


def test_importing_the_pack_looks_at_no_package_before_diffusers_is_imported(broken_flash_attn, tmp_path):
    text = (
        "load()\nprint([name for name in sys.modules if name.startswith('comfyui_attune.')])\n"
        "import json, email\nprint('flash_attn' in sys.modules, len([one for one in sys.meta_path if 'attune' in "
        "type(one).__module__]))"
    )
    command = [sys.executable, "-c", BY_IMPORT + text]
    env = {**os.environ, **broken_flash_attn, "ATTUNE_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, check=True)
    assert done.stdout.splitlines() == ["['comfyui_attune.doctor', 'comfyui_attune.doctor.before_import']", "False 1"]
    assert not (tmp_path / "home").exists()


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
        "PYTHONPATH": on_path(standins / "flash2"),
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
