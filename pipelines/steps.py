"""How far a pipeline's run is: the steps of its scheduler as noise levels, in the units that the model is told."""

from __future__ import annotations

from typing import Any

import torch


def timestep_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The timestep that a model is called with, as a 0-dim tensor on its device; None where there is none."""
    given = kwargs.get("timestep", kwargs.get("timesteps", args[1] if len(args) > 1 else None))
    if isinstance(given, torch.Tensor) and given.numel() and not given.is_complex():
        return given if given.ndim == 0 else given.max()
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return torch.tensor(float(given))
    return None


class Steps:
    """The steps of one run, from its scheduler. Some models (Flux) are told timesteps of 0 to 1, others 0 to 1000."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.first: torch.Tensor | None = None  # the timestep of the first forward

    def _config(self, name: str, default: Any) -> Any:
        found = getattr(getattr(self._scheduler, "config", None), name, None)
        return default if found is None else found

    def unit(self) -> float:
        """What a timestep of the model has to be multiplied by to be one of the scheduler."""
        whole = float(self._config("num_train_timesteps", 1000))
        return whole if self.first is not None and float(self.first) <= 1.0 else 1.0

    def levels(self) -> list[float]:
        """The timesteps of the run as the model is told them, one more than there are steps; [] where nobody knows."""
        timesteps = getattr(self._scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor) or not timesteps.numel() or self.first is None:
            return []
        unit, found = self.unit(), list(dict.fromkeys(timesteps.tolist()))
        # The end of the last step lies below every timestep.
        return [float(t) / unit for t in found] + [0.0 if min(found) > 0 else -1.0 / unit]

    def percent_to_level(self, percent: float) -> float:
        """The timestep, as the model is told it, at `percent` of sampling (0 to 1), as ComfyUI counts it.

        Raises ValueError where the scheduler shifts its noise by the size of the picture: nobody can tell then.
        """
        if self._config("use_dynamic_shifting", False):
            raise ValueError("the scheduler shifts its noise levels by the picture's size")
        timesteps = getattr(self._scheduler, "timesteps", None)
        if isinstance(timesteps, torch.Tensor) and timesteps.numel() and float(timesteps.min()) < 0:
            raise ValueError("the scheduler's timesteps are logarithms of its noise levels")
        whole, left = float(self._config("num_train_timesteps", 1000)), 1.0 - percent
        shift = self._config("shift", None) or self._config("flow_shift", None)
        if shift is not None:  # flow models, as ComfyUI's ModelSamplingDiscreteFlow
            left = float(shift) * left / (1.0 + (float(shift) - 1.0) * left)
            return whole * left / self.unit()
        return (whole - 1.0) * left / self.unit()
