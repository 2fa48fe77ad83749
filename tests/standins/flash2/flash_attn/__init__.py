"""Stand-in for flash-attn 2.8.3."""

__version__ = "2.8.3.post2"

from .flash_attn_interface import flash_attn_func as flash_attn_func


def flash_attn_varlen_func(*_arguments, **_more):
    """diffusers imports it where the package is there."""
    raise NotImplementedError("this stand-in does not model sequences of several lengths")
