"""Stand-in for SageAttention 3 (sageattn3 1.0.0)."""

from .api import sageattn3_blackwell as sageattn3_blackwell
