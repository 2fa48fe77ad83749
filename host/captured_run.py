"""The attention calls of one sampling run that are kept, and the file that they go to."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from torch.compiler import is_compiling

from ..attention.call import AttentionCall, Kind, Undescribable
from ..attention.history import step_of
from ..attention.policy import BlockRange
from ..attention.session import CURRENT
from ..measure.bench_inputs import Tensors
from ..measure.bench_machine import free_bytes, gib
from .attachment import OVERRIDE
from .host_call import describe_host_call
from .output_file import output_path

log = logging.getLogger("attune")
KEY = "attune_capture"
Override = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Wanted:
    """What is kept. `steps`: pairs (first, last), none for all. `size`: bytes of the runs of one prompt together."""

    blocks: BlockRange | None
    steps: Sequence[tuple[int, int]]
    kind: Kind | None
    size: int
    prefix: str

    def has_step(self, step: int) -> bool:
        return not self.steps or any(first <= step <= last for first, last in self.steps)


class CapturedRun:
    """What is kept of one sampling run. Its forwards may be in several threads."""

    def __init__(self, wanted: Wanted, doubles: int, room: int, sigmas: torch.Tensor) -> None:
        self.wanted, self.doubles, self.room = wanted, doubles, room
        self.levels = [float(sigma) for sigma in sigmas.float().tolist()]
        self.size = 0
        self.record: Any = None  # of the router that stands on the model, if one does
        self._kept: dict[str, Tensors] = {}
        self._left: Counter[str] = Counter()  # calls that were left out, by reason
        self._plain: Counter[str] = Counter()  # what the file cannot hold of those that were kept
        self._steps: set[int] = set()
        self._forwards = 0
        self._seen = 0
        self._compiled: bool | None = None
        self._broken = ""
        self._lock = threading.Lock()

    def enter(self, model_options: dict[str, Any]) -> None:
        """Put `apply_model` behind all wrappers of the forward, in the options that were made for this run."""
        options = model_options.setdefault("transformer_options", {})
        wrappers = options.get("wrappers", {})
        others = dict(wrappers.get(WrappersMP.APPLY_MODEL, {}))
        inside = {KEY: [*others.pop(KEY, []), self.apply_model]}
        options["wrappers"] = {**wrappers, WrappersMP.APPLY_MODEL: {**others, **inside}}

    def __deepcopy__(self, _memo: dict[int, Any]) -> CapturedRun:
        return self  # it travels in the options of a run, which other packs may copy

    def apply_model(self, executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around one forward: lets its attention calls be seen where the step is wanted."""
        try:
            options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[3]
            look = self._look(executor.class_obj, t, options)
        except Exception as error:
            self._fail(error)
            look = None
        if look is None:
            return executor(x, t, *args, **kwargs)
        options = {**options, OVERRIDE: look}  # the run's own stay as they are
        if "transformer_options" in kwargs:
            return executor(x, t, *args, **{**kwargs, "transformer_options": options})
        return executor(x, t, *args[:3], options, *args[4:], **kwargs)

    def _look(self, model: Any, t: torch.Tensor, options: Mapping[str, Any]) -> Override | None:
        """The override for one forward; None where nothing of it is wanted."""
        if self._compiled is None:
            self._compiled = is_compiled(getattr(model, "diffusion_model", None))
        if self._compiled or self._broken:
            return None
        forward = CURRENT.get()
        self.record = self.record or getattr(getattr(forward, "session", None), "record", None)
        number, self._forwards = self._forwards, self._forwards + 1
        step = step_of(float(t.max()), self.levels) if len(self.levels) > 1 else number
        self._steps.add(step)
        if not self.wanted.has_step(step):
            return None
        return self._override(step, options.get(OVERRIDE))

    def _override(self, step: int, standing: Override | None) -> Override:
        numbers: Counter[tuple[int | None, str]] = Counter()

        def look(func: Override, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not is_compiling():
                try:
                    with self._lock:
                        self._see(step, numbers, *args, **kwargs)
                except Exception as error:  # out of memory, for one: the run goes on without
                    self._fail(error)
            return func(*args, **kwargs) if standing is None else standing(func, *args, **kwargs)

        return look

    def _fail(self, error: Exception) -> None:
        if not self._broken:
            self._broken = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            log.warning("AttentionCapture: a call could not be captured (%s); no further one is", self._broken)

    def _see(self, step: int, numbers: Counter[tuple[int | None, str]], *args: Any, **kwargs: Any) -> None:
        if self._broken:
            return
        try:
            call, tensors = describe_host_call(*args, doubles=self.doubles, **kwargs)
        except Undescribable:
            self._left["of a form that this pack does not understand"] += 1
            return
        self._seen += 1
        wanted, place = self.wanted, (call.block, call.kind)
        numbers[place] += 1
        if wanted.kind not in (None, call.kind):
            return
        if wanted.blocks is not None and not wanted.blocks.holds(call.block, None):
            if call.block is None:
                self._left["in blocks without a number: leave 'blocks' empty for those"] += 1
            return
        again = f".{numbers[place]}" if numbers[place] > 1 else ""
        where = "other" if call.block is None else f"block{call.block:02}"
        name = f"step{step:02}.{where}.{call.kind}{again}"
        if name not in self._kept:  # else another forward of the same step, such as that of the other conditioning
            self._keep(name, call, tensors)

    def _keep(self, name: str, call: AttentionCall, tensors: Tensors) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        reason = ""
        if call.kv_heads != call.heads or call.v_dim != call.head_dim:
            reason = "with fewer heads, or another dimension, in k and v than in q: attune bench does not take them"
        elif size > self.room - self.size:
            reason = f"for which max_mib ({self.wanted.size >> 20}) has no room left in this prompt"
        elif size > free_bytes(torch.device("cpu")):
            reason = "for which the computer's memory has no room"
        if not reason:
            copies = _copied(tensors)
            if all(bool(copy.isfinite().all()) for copy in copies):
                self._kept[name] = copies
                self.size += size
                self._plain["a mask"] += call.mask is not None
                self._plain["a scale of its own"] += call.scale is not None
                return
            reason = "with NaN or infinity in them"
        self._left[reason] += 1

    def close(self) -> str:
        """Write what was kept, and say what became of it."""
        lines = []
        if self._kept:
            try:
                path = output_path(self.wanted.prefix, ".safetensors")
                _write(path, self._kept)
                short = path.relative_to(Path(folder_paths.get_output_directory())).as_posix()
                lines += [f"Wrote {_calls(len(self._kept))} ({gib(self.size)}) to {short} in ComfyUI's output folder."]
                lines += [f'Measure with: attune bench --inputs "{path}"']
            except Exception as error:  # a full disk: whatever the library makes of it
                lines += [f"What was captured could not be written: {error}"]
        else:
            lines += [f"Nothing was captured: {self._why_not()}"]
        lines += [f"Left out: {_calls(count)} {reason}." for reason, count in self._left.items()]
        lines += [
            f"With {what}, which the file does not hold and the benchmark does without: {_calls(count)}."
            for what, count in self._plain.items()
            if count
        ]
        if self._broken and self._kept:
            lines += [f"A call could not be captured ({self._broken}); no further one was."]
        self._kept = {}
        return "\n".join(lines)

    def _why_not(self) -> str:
        if self._compiled:
            return "this model runs under torch.compile, where nobody sees the tensors. Bypass that node for this run."
        if self._broken:
            return f"it failed ({self._broken})."
        if not any(map(self.wanted.has_step, self._steps)):
            steps = f"{min(self._steps)} to {max(self._steps)}" if self._steps else "no step"
            return f"this run had steps {steps}, none of them is wanted. Each sampler counts its steps from 0."
        if not self._seen and not self._left:
            return "no attention call of this model came through its options, so nobody sees its tensors."
        if self._left:
            return "see below."
        return "no call of the wanted blocks and kind was made."


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


def _copied(tensors: Tensors) -> Tensors:
    """On the CPU, contiguous. Head by head: the device then needs room for one head at most."""
    copies = []
    for tensor in tensors:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        for item in range(tensor.shape[0]):
            for head in range(tensor.shape[1]):
                copy[item, head].copy_(tensor[item, head])
        copies.append(copy)
    return copies[0], copies[1], copies[2]


def _write(path: Path, kept: Mapping[str, Tensors]) -> None:
    """The whole file or none."""
    from safetensors.torch import save_file

    handle, part = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    os.close(handle)
    tensors = {f"{name}.{letter}": t for name, qkv in kept.items() for letter, t in zip("qkv", qkv, strict=True)}
    try:
        save_file(tensors, part)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def is_compiled(net: Any) -> bool:
    """Does torch.compile stand on a network or on a part of it?"""
    if not isinstance(net, torch.nn.Module):
        return False
    return any(
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in net.modules()
    )
