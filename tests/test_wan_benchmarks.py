"""benchmarks/real_size.py and auto.py on a tiny model on the CPU: every step of them, and that nothing is claimed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.loading import ROOT


def run_program(name: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "benchmarks" / name), *options]
    env = {**os.environ, **environment}
    return subprocess.run(program, env=env, capture_output=True, text=True, encoding="utf-8", check=False)


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = run_program("real_size.py", "--json", str(tmp_path / "a.json"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "Needs an NVIDIA GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_step_runs_on_a_cpu_and_claims_nothing(comfyui_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "ä b.json"
    kernels = "host,auto,sdpa,attune_int8"
    # ComfyUI's own attention is sub_quad on a CPU, which torch.compile cannot take whole: its row has to say that.
    done = run_program(
        "real_size.py", "--dry", "--steps", "3", "--kernels", kernels, "--compile", "sdpa,host", "--json", str(file),
        COMFYUI_PATH=str(comfyui_folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text("utf-8"))
    assert result["machine"]["device"] == "no GPU, a dry run" and result["tokens"] == 32
    rows = {row["kernel"]: row for row in result["rows"]}
    plain = ["host", "host, routed", "auto, run 1", "sdpa", "attune_int8", "host, again"]
    assert list(rows) == [*plain, "sdpa, compiled", "host, compiled"]  # calls this short are left to the host by auto
    for name in ("host", "host, routed", "auto, run 1", "sdpa", "host, again", "sdpa, compiled"):
        row = rows[name]
        assert row["status"] == "measured" and row["seconds_per_step"] > 0 and row["first_step_s"] > 0, row
        assert row["over_host"] == row["seconds_per_step"] / rows["host"]["seconds_per_step"]
        # float32 on a CPU, against `split`: another order of sums and no more.
        assert 0 < row["error"] < 1e-5 and row["latent_error"] < 1e-5
        assert row["peak_gib"] is None
        # 3 forwards of 2 blocks with a self and a cross attention.
        assert name in ("host", "host, again") or (sum(row["observed"].values()), row["repeated"]) == (12, 0)
    assert rows["sdpa"]["observed"] == rows["sdpa, compiled"]["observed"] == {"sdpa": 12}
    assert (rows["sdpa, compiled"]["graphs"], rows["sdpa, compiled"]["graph_breaks"]) == (1, 0)
    refused = rows["attune_int8"]
    assert refused["status"] == "other kernel" and "seconds_per_step" not in refused
    assert refused["refused"] == ["attune_int8: needs a cuda device, this is cpu"]
    failed = rows["host, compiled"]
    assert failed["status"] == "failed" and "Unsupported" in failed["reason"] and "seconds_per_step" not in failed


def test_auto_is_compared_with_the_host_and_the_best_kernel(comfyui_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "ä b.json"
    small = ("--rounds", "1", "--steps", "2", "--blocks", "2", "--tokens", "64", "--kernels", "split")
    done = run_program("auto.py", "--comfyui", str(comfyui_folder), *small, "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text("utf-8"))
    assert set(result["seconds"]) == {"host", "split", "auto, first run", "auto, later runs"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["best"] == "split" and result["same_bits"]
    # 2 forwards of 2 blocks, each with both conditionings at once or one after the other; too short to be measured.
    (ran,) = result["kernels_that_ran"]
    assert set(ran) == {"host"} and ran["host"] >= 8
