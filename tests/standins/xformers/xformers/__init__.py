"""Stand-in for xformers 0.0.35."""

__version__ = "0.0.35"
