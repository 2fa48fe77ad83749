"""Real q, k and v of a sampling run as a file for `attune bench --inputs`: what the node AttentionCapture does.

A wrapper around the sampler puts another one around each forward of that run only, behind those of all other nodes.
There the override that stands on the model by then, whoever made it, is called by one that looks first. So the order of
the nodes does not matter, and neither the model nor any rule is touched.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping
from typing import Any

import comfy.model_management
from comfy.patcher_extension import WrappersMP

from .captured_run import KEY, CapturedRun, Wanted
from .server import EVENT, prompt_context, server_instance

log = logging.getLogger("attune")
NODE = "AttentionCapture"
_NUMBERS = itertools.count(1)


def parse_steps(text: str) -> tuple[tuple[int, int], ...]:
    """Read steps such as "0, 10-12"; blank text means every step (an empty tuple). Raises ValueError."""
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        read = re.fullmatch(r"(\d{1,9})\s*(?:-\s*(\d{1,9}))?", part)
        if read is None or int(read[1]) > int(read[2] or read[1]):
            raise ValueError(
                f"{part!r} is no step. Wanted steps counted from 0, such as 0, or 0, 10, or 4-7, or nothing for all."
            )
        found.append((int(read[1]), int(read[2] or read[1])))
    if text.strip() and not found:
        raise ValueError(f"{text!r} names no step. Wanted steps counted from 0, such as 0, 10, or nothing for all.")
    return tuple(found)


class Capture:
    """One AttentionCapture node on a model: a wrapper around each sampling of it, with a file for each."""

    def __init__(self, wanted: Wanted, source: str, doubles: int = 0) -> None:
        self.wanted, self.source, self.doubles = wanted, source, doubles
        self._spent: tuple[str | None, int] = (None, 0)  # (prompt id, bytes that its runs have kept)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Capture:
        return self

    def sampler_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around `sampler.sample(guider, sigmas, extra_args, …)`: inside whatever follows a whole run."""
        run: CapturedRun | None = None
        about = prompt_context()
        try:
            prompt = about["prompt_id"]
            used = self._spent[1] if prompt is not None and self._spent[0] == prompt else 0
            run = CapturedRun(self.wanted, self.doubles, self.wanted.size - used, args[1])
            run.enter(args[2]["model_options"])
        except Exception:  # a host whose samplers are called in another way: never the run's concern
            log.exception("AttentionCapture could not follow a sampling run: nothing is captured of it")
        status = "failed"
        try:
            out = executor(*args, **kwargs)
            status = "finished"
            return out
        except comfy.model_management.InterruptProcessingException:
            status = "stopped"
            raise
        finally:
            if run is not None:
                try:
                    self._spent = (about["prompt_id"], used + run.size)
                    self._tell(run, run.close(), about, status)
                except Exception:
                    log.exception("AttentionCapture could not end in order; the sampling run is not concerned")

    def _tell(self, run: CapturedRun, text: str, about: Mapping[str, Any], status: str) -> None:
        """Say what was captured: in the log, in the run's own record where it has one, and on the node."""
        log.info("AttentionCapture (node %s): %s", self.source, text.replace("\n", " "))
        if run.record is not None:
            run.record.note(f"AttentionCapture: {text.splitlines()[0]}")
        server = server_instance()
        if server is not None and about["client_id"] is not None:
            part = {"node_type": NODE, "requested": "", "calls": 0, "observed": {}, "refused": [], "text": text}
            what = {key: about[key] for key in ("prompt_id", "workflow_id", "sampler_node")}
            number = f"capture {next(_NUMBERS)}"
            what |= {"run": number, "status": status, "notes": [], "nodes": {self.source: part}}
            server.send_sync(EVENT, what, about["client_id"])


def add_capture(model: Any, wanted: Wanted, source: str, doubles: int) -> Any:
    """A clone of `model` whose sampling runs are captured; `model` itself stays as it is."""
    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, Capture(wanted, source, doubles).sampler_sample)
    return patched
