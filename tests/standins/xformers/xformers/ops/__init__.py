"""Stand-in for `xformers.ops`."""

from . import fmha as fmha
from .fmha import MemoryEfficientAttentionCutlassOp as MemoryEfficientAttentionCutlassOp
from .fmha import memory_efficient_attention as memory_efficient_attention
