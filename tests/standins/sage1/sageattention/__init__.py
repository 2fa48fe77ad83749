"""Stand-in for sageattention 1.0.6."""

from .core import CALLS, sageattn

__all__ = ["CALLS", "sageattn"]
