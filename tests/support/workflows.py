"""The workflow files of the pack, and what tests do to them: read, bypass, make small."""

import copy
import json

from .loading import ROOT
from .server import shrink

FILES = sorted((ROOT / "workflows").glob("*.json"))
NAMES = [path.stem for path in FILES]
TWO_STAGES = ["wan2.2_flf2v_14b", "wan2.2_i2v_14b", "wan2.2_t2v_14b"]
ONE_STAGE = "wan2.2_ti2v_5b"
PATCHES = {"AttentionSelector", "Sage3Switch"}
OURS = {*PATCHES, "ReleaseModel"}
ACTIVE, BYPASSED = 0, 4
# Node ids: 117 and 118 as in the workflows that people share, where they switch Sage3 on and off.
RELEASE = 119
SELECTORS, SWITCHES, LORAS, START_IMAGE, STEPS, SPLIT, CFG = (115, 116), (117, 118), (91, 92), 62, "110", "111", "112"
TITLE = 30  # pixels that a node's title stands above its position


def read(name: str) -> dict:
    """The UI workflow of that name in workflows/."""
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))


def nodes_of(workflow: dict) -> dict[int, dict]:
    """The nodes of a UI workflow by id."""
    return {node["id"]: node for node in workflow["nodes"]}


def set_mode(workflow: dict, mode: int, which=OURS) -> dict:
    """A copy with every node whose type or id is in `which` in `mode`, ACTIVE or BYPASSED."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"] in which or node["id"] in which:
            node["mode"] = mode
    return workflow


def small(server, workflow: dict, seed: int, steps: int = 2, latents: bool = True) -> dict:
    """The API prompt for a UI workflow in the smallest size; it ends after sampling unless `latents` is False.

    `steps` is the number of steps of both stages together. A prompt that ends after sampling saves its latents instead
    of a video: the 5B workflow's VAE is the only part here that takes seconds.
    """
    prompt = shrink(server.api(workflow), size=64, length=5, steps=steps)
    if STEPS in prompt:
        prompt[STEPS]["inputs"]["value"], prompt[SPLIT]["inputs"]["value"] = steps, steps // 2
    sampler = prompt["57"]["inputs"]
    sampler["noise_seed" if "noise_seed" in sampler else "seed"] = seed
    if latents:
        save = {"samples": prompt["8"]["inputs"]["samples"], "filename_prefix": "latents/test"}
        prompt = {key: node for key, node in prompt.items() if key not in ("8", "60", "61")}
        prompt["61"] = {"class_type": "SaveLatent", "inputs": save}
    return prompt


def latent(result):
    """The latents that a prompt of small() saved, float64."""
    from safetensors.torch import load_file

    (file,) = result.files
    return load_file(file)["latent_tensor"].double()


def overlap(a, b) -> bool:
    """Whether two boxes (left, top, right, bottom) share more than an edge."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(inner, outer) -> bool:
    """Whether the box `inner` lies within `outer`."""
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def bounds(group: dict) -> tuple[float, float, float, float]:
    """The box of a group of a UI workflow."""
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height
