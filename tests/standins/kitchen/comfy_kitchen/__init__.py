"""Stand-in for the int8 attention of comfy-kitchen 0.2.40."""

__version__ = "0.2.40"

from .sage_attention import (
    PrequantizedInt8Attention,
    int8_attention,
    int8_attention_from_prequantized,
    prequantize_int8_attention,
)
from .sage_attention import is_available as int8_attention_is_available

__all__ = [
    "PrequantizedInt8Attention",
    "int8_attention",
    "int8_attention_from_prequantized",
    "int8_attention_is_available",
    "prequantize_int8_attention",
]
