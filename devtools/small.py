"""The demo's workflow at a size for a CPU, as a file that ComfyUI lists under Workflows."""

import copy
import json
from pathlib import Path

NAME = "attune demo small"
CPU_SIZE, CPU_LENGTH, CPU_STEPS = 64, 5, 2
AFTER = {"fixed", "increment", "decrement", "randomize"}  # behind a seed: a value that has no input


def file_of(base: Path) -> Path:
    """Where the ComfyUI with this base directory looks for it."""
    return base / "user" / "default" / "workflows" / f"{NAME}.json"


def save(base: Path, ui: dict, prompt: dict, lowered: dict) -> None:
    """Write the UI workflow `ui` with the numbers that differ between its prompt and `lowered`.

    There is no file afterwards where one of them cannot be found in `ui`: half of it would be as slow as none.
    """
    file = file_of(base)
    file.unlink(missing_ok=True)
    if (small := _with_numbers(ui, prompt, lowered)) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(small), "utf-8")


def where(base: Path, on_cpu: bool) -> str:
    """What to open in the browser, in words."""
    templates = "the workflow under Templates, Extensions"
    if not on_cpu:
        return templates
    if file_of(base).exists():
        return f'"{NAME}" under Workflows (key W); what is under Templates is the full size, too much for a CPU'
    return (
        f"{templates}, and lower it before you run it, it is too much for a CPU: "
        f"width and height {CPU_SIZE}, length {CPU_LENGTH}, {CPU_STEPS} steps for each sampler"
    )


def _with_numbers(ui: dict, prompt: dict, lowered: dict) -> dict | None:
    small = copy.deepcopy(ui)
    nodes = {str(node.get("id")): node for node in small.get("nodes", [])}
    for key, data in lowered.items():
        for name, value in data["inputs"].items():
            if value == prompt[key]["inputs"][name]:
                continue
            place = _place(nodes.get(key, {}), name)  # nodes of subgraphs are not among them
            if place is None:
                return None
            nodes[key]["widgets_values"][place] = value
    return small


def _place(node: dict, name: str) -> int | None:
    """Where the value of that input stands in `widgets_values`; None where the file does not tell."""
    values, place = node.get("widgets_values"), 0
    if not isinstance(values, list):
        return None
    for given in (slot["name"] for slot in node.get("inputs", []) if slot.get("widget")):
        if given == name:
            return place if place < len(values) else None
        place += 1
        if "seed" in given and place < len(values) and values[place] in AFTER:
            place += 1
    return None
