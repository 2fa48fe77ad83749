"""Print how far two videos are apart: {"frames", "difference"}, the largest mean difference of a frame, of 255."""

import json
import sys

import av
import numpy


def frames(path: str) -> list[numpy.ndarray]:
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]


first, second = frames(sys.argv[1]), frames(sys.argv[2])
same = len(first) == len(second) and all(a.shape == b.shape for a, b in zip(first, second, strict=True))
apart = [float(abs(a - b).mean()) for a, b in zip(first, second, strict=True)] if same else [255.0]
print(json.dumps({"frames": len(second), "difference": max(apart, default=255.0)}))
