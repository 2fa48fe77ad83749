"""Make a picture for every LoadImage node of some UI workflows that has none yet.

<python of .venv> make_inputs.py <input folder> <workflow.json> ...
"""

import json
import sys
import zlib
from pathlib import Path

import numpy
from PIL import Image


def names(workflow: dict) -> set[str]:
    """The file names in the LoadImage nodes of a UI workflow, those inside subgraphs included."""
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    nodes = [node for graph in graphs for node in graph["nodes"] if node["type"] == "LoadImage"]
    return {node["widgets_values"][0] for node in nodes if node.get("widgets_values")}


def picture(name: str) -> Image.Image:
    """A soft colour pattern of 128 x 128 that depends on the name alone."""
    across, down = numpy.meshgrid(numpy.linspace(0, 1, 128), numpy.linspace(0, 1, 128))
    phases = numpy.random.default_rng(zlib.crc32(name.encode())).uniform(0, 6.28, 3)
    waves = [numpy.sin(6.28 * (across * (turn + 1) + down) + phase) for turn, phase in enumerate(phases)]
    return Image.fromarray(((numpy.stack(waves, axis=2) + 1) * 127.5).astype("uint8"))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for path in sys.argv[2:]:
        for name in names(json.loads(Path(path).read_text("utf-8"))):
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                picture(name).save(folder / name)
