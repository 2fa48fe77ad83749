"""What is around a pipeline's run: what has to be known before it, and what is kept after it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.plan import AUTO, expand
from ..attention.prepare import make_ready
from ..attention.router import Router
from ..attention.session import Session
from ..doctor.store import home
from ..host.remembered import recall, remember
from ..host.run_files import FOLDER, save
from ..host.runs import RunInfo
from .models import bare
from .process import PACK, machine, measured, verdicts
from .steps import Steps

log = logging.getLogger("attune")
HOST = "diffusers"  # what made a run, in its record


@dataclass
class Run(RunInfo):
    """`own`: what the pipeline computes attention with by itself, as `Machine.host_attention` names it."""

    own: str = ""

    def data(self) -> dict[str, Any]:
        """Everything that is known of it, for JSON."""
        return self.as_data(machine(self.own))


def _fingerprint(kind: type, models: Iterable[torch.nn.Module], own: str) -> str:
    """Tells pipelines apart by what they compute: classes, configurations and sizes, not the weights' values.

    own: what they compute attention with by themselves; what is known of the kernel `host` holds for that one.
    """
    about: list[Any] = [own] if own else []
    for model in map(bare, models):
        config = getattr(model, "config", None) or {}
        config = config.to_dict() if hasattr(config, "to_dict") else config  # a model of transformers
        config = sorted((str(key), str(value)) for key, value in config.items())
        about.append((type(model).__name__, config, sum(weights.numel() for weights in model.parameters())))
    return hashlib.sha256(repr((kind.__name__, about)).encode()).hexdigest()[:24]


def prove(router: Router, device: str, session: Session) -> None:
    """Wait for the verdicts on kernels that a rule names; `auto` does without those that are still to come."""
    here = router.machine
    timings = measured(here.host_attention).recall()

    def say(name: str) -> None:
        text = f"waiting for the verdict on {name}: it is tried in a child process, once in this environment"
        session.record.note(text)
        log.warning("Attune: %s.", text)

    automatic: dict[str, None] = {}
    for wish in dict.fromkeys(wish for rule in router.policy.rules for wish in rule.kernels):
        names = expand(wish, here, device)
        if wish not in AUTO:
            verdicts().wait(names, device, say)
        else:
            automatic |= dict.fromkeys(names)

    def tell(text: str) -> None:
        session.record.note(text)
        log.info("Attune: %s.", text)

    if timings is not None and automatic:
        make_ready(timings, router.kernels, automatic, here, device, router.link.refused, tell)


def recalled(router: Router, session: Session, kind: type, models: Iterable[torch.nn.Module]) -> str:
    """Tell the session what failed in earlier runs of such a pipeline; returns the pipeline's fingerprint."""
    try:
        model = _fingerprint(kind, models, router.machine.host_attention)
        for finding in recall(home(PACK), model, dict(router.kernels), machine()):
            session.blame(finding, remembered=True)
        return model
    except Exception:  # what is remembered must never cost a run
        log.exception("What failed in earlier runs of this pipeline could not be looked up")
        return ""


def close(run: Run, router: Router, session: Session, steps: Steps, model: str) -> None:
    """A run has ended, in whatever way: keep what is to be known of it later. model: the pipeline's fingerprint."""
    try:
        if model and session.findings:
            remember(home(PACK), model, session.findings, dict(router.kernels), machine())
        session.tuner.close()
        measured(run.own).keep()
        record = session.record
        record.sigmas = steps.levels()
        run.steps = max(0, len(record.sigmas) - 1)
        if not record.observed() and record.forwards and run.status == "finished":
            record.note("no attention call of this pipeline reached the pack: it ran unchanged")
        run.close()
        save(run, machine(run.own), home(PACK) / FOLDER)
    except Exception:  # the account of a run must never cost the run
        log.exception("The record of a pipeline's run could not be completed")
