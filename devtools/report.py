"""What the demo prints after a run."""

import platform
from pathlib import Path

from .say import Stop, note, step


def machine(stats: dict) -> None:
    """The machine, from GET /system_stats."""
    system = stats["system"]
    step("Machine")
    note(f"{platform.system()} {platform.machine()}, {system['ram_total'] / 2**30:.1f} GiB of memory")
    note(
        f"ComfyUI {system['comfyui_version']}, PyTorch {system['pytorch_version']}, "
        f"Python {system['python_version'].split()[0]}"
    )
    for device in stats["devices"]:
        room = "" if device["type"] == "cpu" else f", {device['vram_total'] / 2**30:.1f} GiB"
        note(f"device: {device['name']}{room}")


def kernels(found: list[dict]) -> None:
    """Each kernel and whether it can run here, with the reasons if not, from GET /attune/kernels."""
    step("Kernels on this machine")
    for kernel in found:
        reasons = "; ".join(kernel["reasons"])
        note(f"{kernel['name']:<22} {kernel['precision']:<6} {kernel['status']}{': ' if reasons else ''}{reasons}")


def calls(runs: list[dict], prompt: dict) -> None:
    """Per branch the attention calls by kernel, and why not the kernel that was asked for."""
    step("Attention calls")
    for run in runs:
        title = branch(prompt, run["sampler_node"])
        note(f"{title}: {_counts(run['observed'])}   ({run['forwards']} forwards of {run['model']}, {run['status']})")
        for node_id, node in run["nodes"].items():
            note(f"    {node['node_type']} ({node_id}) asked for {node['requested']}: {_counts(node['observed'])}")
            for refusal in node["refused"]:
                why = "; ".join(refusal["reasons"])
                note(f"        not {refusal['kernel']} ({refusal['calls']} calls): {why}")
        for text in run.get("notes", []):
            note(f"    {text}")


def video(history: dict, base: Path) -> list[Path]:
    """The paths of the files written, printed and returned. Raises Stop when there is none."""
    found = (item for output in history["outputs"].values() for entry in output.values() for item in entry)
    items = [item for item in found if isinstance(item, dict) and item.get("type") == "output"]
    files = [base / "output" / item["subfolder"] / item["filename"] for item in items]
    if not files or not all(file.is_file() and file.stat().st_size for file in files):
        raise Stop(f"The run wrote no video below {base / 'output'}.")
    step("Video")
    for file in files:
        note(str(file))
    return files


def branch(prompt: dict, sampler: str) -> str:
    """`high noise` or `low noise` by the model file that feeds a sampler of an API prompt, else the file's name."""
    node, seen = str(sampler), set()
    while node in prompt and node not in seen:
        seen.add(node)
        inputs = prompt[node]["inputs"]
        if name := inputs.get("unet_name") or inputs.get("ckpt_name"):
            known = [noise for noise in ("high", "low") if f"{noise}_noise" in name]
            return f"{known[0]} noise" if known else name
        links = [inputs[key][0] for key in ("model", "on_true", "on_false") if isinstance(inputs.get(key), list)]
        node = links[0] if links else None
    return f"sampler {sampler}"


def _counts(observed: dict) -> str:
    return ", ".join(f"{kernel} x{count}" for kernel, count in observed.items()) or "no calls"
