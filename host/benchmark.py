"""The comparison of kernels inside ComfyUI: what the node AttentionBenchmark does."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.utils
import numpy
import torch
from comfy.patcher_extension import WrappersMP

from ..attention.call import AttentionCall, Undescribable
from ..attention.machine import Device
from ..attention.router import Router
from ..attention.session import BUSY, CURRENT
from ..measure.bench import Bench, Case, run_bench
from ..measure.bench_file import as_csv, write
from ..measure.bench_plot import HOW_TO_INSTALL, save_plot
from ..measure.bench_table import table
from ..measure.shapes import SETS, Shape
from ..measure.timing import Effort
from . import attachment, captured_run, trampoline
from .host_call import describe_host_call
from .output_file import output_path
from .process import kernels, machine, verdicts
from .server import say_on_node

log = logging.getLogger("attune")
FROM_MODEL = "from the model"
_KEY = "attune_benchmark"
_COMPILED = "torch.compile"  # the key of the host's wrapper
_MOST_SHAPES = 8  # of one model: a UNet has two to eight, and each takes some seconds for each kernel
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_PREFIX = "attune/bench"


class Asked(NamedTuple):
    """What the user wants measured. `shapes`: FROM_MODEL or one of SETS; `dtype`: "auto" or one of _DTYPES."""

    shapes: str
    exact: bool
    seconds: float
    seed: int
    dtype: str


class _Watcher:
    """Sees each attention call of a forward before the host computes it.

    It is the model's override, and stands in `CURRENT` in the place of a Forward and its router: that is how calls
    without options come here.
    """

    takes_bare_calls = True

    def __init__(self, earlier: Any) -> None:
        self.router, self.earlier = self, earlier  # what another pack put on the model stays what it is
        self.calls: Counter[AttentionCall] = Counter()
        self.strange = 0

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Watcher:
        return self

    def __call__(self, func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._see(*args, **kwargs)
        token = CURRENT.set(BUSY)
        try:
            return func(*args, **kwargs) if self.earlier is None else self.earlier(func, *args, **kwargs)
        finally:
            CURRENT.reset(token)

    def route(self, func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A call without options; another pack's override would not have seen it either."""
        self._see(*args, **kwargs)
        token = CURRENT.set(BUSY)
        try:
            return trampoline.plain(func)(*args, **kwargs)
        finally:
            CURRENT.reset(token)

    def bound(self, func: Any) -> Any:
        return functools.partial(self.route, func)

    def _see(self, *args: Any, **kwargs: Any) -> None:
        try:
            call, _ = describe_host_call(*args, **kwargs)
        except (Undescribable, AttributeError, TypeError):
            self.strange += 1
        else:
            self.calls[call] += 1

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        token = CURRENT.set(self)  # type: ignore[arg-type]
        try:
            return executor(*args, **kwargs)
        finally:
            CURRENT.reset(token)


def watch_one_step(model: Any, positive: Any, negative: Any, latent: Any, seed: int) -> _Watcher:
    """Sample one step of a clone of `model`, without this pack's nodes and without torch.compile, and see its calls.

    The host's own sampler does it, so that conditioning, batching and loading are those of a real run.
    """
    import nodes as host_nodes  # ComfyUI's module of that name

    watched = model.clone()
    for kind, key in (
        (WrappersMP.OUTER_SAMPLE, attachment.KEY),
        (WrappersMP.APPLY_MODEL, attachment.KEY),
        (WrappersMP.SAMPLER_SAMPLE, captured_run.KEY),
        (WrappersMP.APPLY_MODEL, _COMPILED),
    ):
        watched.remove_wrappers_with_key(kind, key)
    options = watched.model_options.setdefault("transformer_options", {})
    standing = options.get(attachment.OVERRIDE)
    watcher = _Watcher(getattr(standing, "earlier", None) if isinstance(standing, Router) else standing)
    options[attachment.OVERRIDE] = watcher
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, watcher.apply_model)
    # One step is not worth compiling for. Parts of the model may be compiled by other packs; torch has it since 2.6.
    stance = getattr(torch.compiler, "set_stance", None)
    cfg = 1.0 if negative is None else 2.0
    with trampoline.installed(host_attention), stance("force_eager") if stance else nullcontext():
        host_nodes.common_ksampler(
            watched, seed, 1, cfg, "euler", "simple", positive, negative or positive, latent, denoise=1.0
        )
    return watcher


def cases_of(name: str, calls: Mapping[AttentionCall, int], strange: int = 0) -> tuple[list[Case], list[str]]:
    """(what to measure, the largest first, what is to be said of it) for the calls of one step of model `name`."""
    counts: Counter[tuple[int, int, int, int, int, torch.dtype]] = Counter()
    said: Counter[str] = Counter({"left out, not to be understood": strange})
    for call, count in calls.items():
        if call.v_dim != call.head_dim:
            said["left out, with values of another dimension than keys"] += count
            continue
        said["measured without their mask"] += count * (call.mask is not None)
        said["measured with keys for each head, though heads share them"] += count * (call.kv_heads != call.heads)
        counts[call.batch, call.heads, call.q_len, call.kv_len, call.head_dim, call.dtype] += count

    def work(place: tuple[int, int, int, int, int, torch.dtype]) -> int:
        return counts[place] * Shape("", *place[:5]).flops

    largest = sorted(counts, key=work, reverse=True)
    cases, used = [], Counter[str]()
    lines = [f"One step of {name}:"]
    for *numbers, dtype in largest[:_MOST_SHAPES]:
        kind = f"{name} {'self' if numbers[2] == numbers[3] else 'cross'}"
        used[kind] += 1
        title = kind if used[kind] == 1 else f"{kind} {used[kind]}"
        cases.append(Case(Shape(title, *numbers), dtype))
        lines.append(f"  {cases[-1].shape}, ×{counts[(*numbers, dtype)]}")
    if left := largest[_MOST_SHAPES:]:
        share = sum(map(work, left)) / max(1, sum(map(work, largest)))
        lines.append(f"  {len(left)} smaller shapes, {share:.1%} of the work, are not measured.")
    lines += [f"  {what}: ×{count}" for what, count in said.items() if count]
    return cases, lines


def _from_model(
    asked: Asked, model: Any, positive: Any, negative: Any, latent: Any
) -> tuple[Device, list[Case], list[str]]:
    given = {"model": model, "positive": positive, "latent": latent}
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(
            f"shapes {FROM_MODEL!r} needs {', '.join(given)}; not connected: {', '.join(missing)}. Connect what the "
            f"sampler has there, or choose one of the sets: {', '.join(SETS)}."
        )
    if not hasattr(model, "add_wrapper_with_key"):
        raise ValueError(
            f"a model of type {type(model).__name__} cannot be looked into: wanted a ComfyUI MODEL, as the loaders of "
            f"ComfyUI give it, or one of the sets of shapes: {', '.join(SETS)}."
        )
    say_on_node("one step of the model, to see its shapes")
    name = type(model.model).__name__
    watcher = watch_one_step(model, positive, negative, latent, asked.seed)
    cases, lines = cases_of(name, watcher.calls, watcher.strange)
    if not cases:
        raise ValueError(
            f"no attention call of this model ({name}) could be seen in one step: it computes attention in its own "
            f"way. Choose one of the sets of shapes: {', '.join(SETS)}."
        )
    place = Counter(call.device for call in watcher.calls).most_common(1)[0][0]
    return machine().device(place), cases, lines


def _from_set(asked: Asked) -> tuple[Device, list[Case], list[str]]:
    device = machine().main_device
    dtype = _DTYPES.get(asked.dtype)
    if dtype is None:
        emulated = bool(device.capability) and device.capability < (8, 0)
        dtype = torch.float32 if device.type == "cpu" else torch.float16 if emulated else torch.bfloat16
    return device, [Case(shape, dtype) for shape in SETS[asked.shapes]()], [f"Shapes of the set {asked.shapes}."]


def _refused(device: str) -> dict[str, str]:
    """Kernel → why it is not run in this process, "" where it is; waits for the verdicts that are still to come."""
    waited: list[str] = []

    def say(name: str) -> None:
        waited.append(name)
        say_on_node(f"trying {', '.join(waited)} in child processes")

    stop = comfy.model_management.throw_exception_if_processing_interrupted
    known = verdicts().settle(device, say, stop)
    found = dict.fromkeys(kernels(), "")  # those that have no verdict are the host's own functions
    for name, verdict in known.items():
        found[name] = "" if verdict.works else "; ".join(verdict.reasons) or f"{verdict.outcome}: {verdict.detail}"
    return found


def _picture(result: Mapping[str, Any], source: str) -> numpy.ndarray:
    """The plot, or why there is none: (H, W, 3), uint8. source: where its figures can be read."""
    from PIL import Image, ImageDraw, ImageFont

    try:
        with tempfile.TemporaryDirectory(prefix="attune") as folder:
            path = Path(folder) / "plot.png"
            save_plot(result, path, source)
            with Image.open(path) as image:
                return numpy.array(image.convert("RGB"))
    except ImportError:
        text = HOW_TO_INSTALL.replace(": ", ":\n")
    except ValueError as error:
        text = str(error).capitalize() + "; the table tells why."
    image = Image.new("RGB", (1200, 160), "#FFFFFF")
    ImageDraw.Draw(image).multiline_text(
        (30, 30), f"Attention Benchmark\n{text}", fill="#1F2328", font=ImageFont.load_default(20), spacing=6
    )
    return numpy.array(image)


def _save(result: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """(path of the CSV, "" where it could not be written; what is to be said of it)."""
    if not result["rows"]:
        return "", ""
    try:
        write(path, as_csv(result))
    except OSError as error:
        log.warning("Attention Benchmark: %s could not be written (%s)", path, error)
        return "", f"The CSV could not be written to {path} ({error})."
    return str(path), f"CSV: {path}"


def benchmark(
    asked: Asked, model: Any = None, positive: Any = None, negative: Any = None, latent: Any = None
) -> tuple[numpy.ndarray, str, str]:
    """(plot (H, W, 3) uint8, table, path of the CSV). Raises ValueError, or what stops a prompt.

    Stopped by the user, what was measured until then is in the CSV.
    """
    path = output_path(_PREFIX, ".csv")  # told now, not after minutes of measuring
    lines: Sequence[str]
    if asked.shapes == FROM_MODEL:
        device, cases, lines = _from_model(asked, model, positive, negative, latent)
    else:
        device, cases, lines = _from_set(asked)
    refused = _refused(device.name)
    chosen = [kernel for kernel in kernels().values() if kernel.exact or not asked.exact]
    bar = comfy.utils.ProgressBar(len(chosen) * len(cases))

    def told(done: int, in_all: int, text: str) -> None:
        bar.update_absolute(done, in_all)
        say_on_node(f"{done}/{in_all}  {text}")

    bench = Bench(
        chosen,
        machine(),
        device.name,
        cases,
        refused,
        Effort(budget=asked.seconds),
        asked.seed,
        told=told,
        stop=comfy.model_management.processing_interrupted,
    )
    try:
        result = run_bench(bench)
    finally:
        comfy.model_management.soft_empty_cache()
    where, said = _save(result, path)
    if comfy.model_management.processing_interrupted():
        log.info("Attention Benchmark was stopped. %s", said)
        comfy.model_management.throw_exception_if_processing_interrupted()
    text = "\n".join([*lines, "", table(result), "", said])
    return _picture(result, Path(where).name), text, where
