"""Stand-in for FlashAttention 4. Like the real wheel it leaves `flash_attn` itself without an `__init__.py`."""

__version__ = "0.0.0"

from .interface import flash_attn_func as flash_attn_func
