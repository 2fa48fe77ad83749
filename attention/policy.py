"""What the user asked for: rules, stacked in a policy by the nodes that stand on a model."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from .call import AttentionCall, Kind

# Every name that a user can give, in the order in which option lists show them. Shared workflows hold these names:
# the list only grows at its end, and never depends on the machine. Names of kernels/ that are not here come after these
# (kernels/__init__.py).
KERNEL_NAMES: list[str] = [
    "auto",
    "auto_fast",
    "host",
    "sdpa",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "sdpa_math",
    "xformers",
    "xformers_cutlass",
    "flash",
    "flash2",
    "flash3",
    "flash4",
    "sage",
    "sage1",
    "sage2_fp16_triton",
    "sage2_fp16_cuda",
    "sage2_fp8_cuda",
    "sage2_fp8_cuda_pp",
    "sage3",
    "sage3_per_block_mean",
    "kitchen_int8",
    "attune_int8",
    "split",
    "sub_quad",
    "basic",
    "attune_bf16",
]

# A family's name means its members, best first; each still has to be able to run.
FAMILIES: dict[str, tuple[str, ...]] = {
    "flash": ("flash4", "flash3", "flash2"),
    "sage": ("sage2_fp8_cuda_pp", "sage2_fp8_cuda", "sage2_fp16_cuda", "sage2_fp16_triton", "sage1"),
}


def _float32(number: float) -> float:
    """The nearest float32: the host compares a float32 tensor with its limits, which rounds them."""
    return float(struct.unpack("f", struct.pack("f", float(number)))[0])


ERROR_BUDGET = 0.05
OnRefusal = Literal["fall_through", "error"]


class UnknownKernelError(ValueError):
    """A kernel name that is not in `KERNEL_NAMES`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no attention kernel called {name!r}. The names are: {', '.join(KERNEL_NAMES)}.")


class BlockRangeError(ValueError):
    """A block range that cannot be read, is empty, or lies beyond the model."""


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Blocks `first` to `last`, both included, counted from 0; negative numbers count from the end (-1 is the last)."""

    first: int
    last: int

    def resolve(self, blocks: int | None) -> tuple[int, int] | None:
        """(first, last) counted from 0, or None where that needs the model's block count and it is not known."""
        if blocks is None and (self.first < 0 or self.last < 0):
            return None
        size = blocks or 0
        return (self.first + size if self.first < 0 else self.first), (self.last + size if self.last < 0 else self.last)

    def unknown_to(self, call: AttentionCall) -> bool:
        """True where the model does not tell enough to say whether `call` lies in this range."""
        return call.block is None or self.resolve(call.blocks) is None

    def holds(self, block: int | None, blocks: int | None) -> bool:
        bounds = self.resolve(blocks)
        return bounds is not None and block is not None and bounds[0] <= block <= bounds[1]


def parse_blocks(text: str, blocks: int | None = None) -> BlockRange | None:
    """Read a block range such as "2-37" or "5"; blank text means every block (None).

    `blocks` is the model's number of blocks where it is known. Raises BlockRangeError with what is wrong and what a
    range looks like.
    """
    text = text.strip()
    if not text:
        return None
    known = f"This model has {blocks} blocks, 0 to {blocks - 1}." if blocks else "Blocks are counted from 0."
    example = f"Wanted one block such as 5, a range such as 2-37, or nothing for all. {known}"
    found = re.fullmatch(r"(\d+)\s*(?:-\s*(\d+))?", text)
    if found is None:
        raise BlockRangeError(f"{text!r} is not a block range. {example}")
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last:
        raise BlockRangeError(f"the block range {text!r} runs backwards. {example}")
    if blocks is not None and last >= blocks:
        raise BlockRangeError(f"the block range {text!r} goes beyond the model. {example}")
    return BlockRange(first, last)


@dataclass(frozen=True, slots=True)
class Rule:
    """Use `kernels` (tried in this order) for the calls that match.

    `from_percent` and `to_percent` are ComfyUI's percent of sampling, 0 to 100, both ends included, and never a share
    of the steps. `kind` None means self and cross attention. `min_tokens` is the least number of query tokens.
    `on_refusal` "error" raises where none of `kernels` can run, "fall_through" goes to the rule before this one.
    `exact_only` makes this a dense rule: earlier rules decide, but only with exact kernels, and `kernels` are what
    comes after them. `error_budget` is how far from float32 (relative L1) what `auto_fast` chooses may be; 0 leaves it
    exact kernels only. `timed`: every call is timed. `source` is the id of the node that made the rule.
    """

    kernels: tuple[str, ...]
    from_percent: float = 0.0
    to_percent: float = 100.0
    blocks: BlockRange | None = None
    kind: Kind | None = None
    min_tokens: int = 0
    on_refusal: OnRefusal = "fall_through"
    exact_only: bool = False
    error_budget: float = ERROR_BUDGET
    timed: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for name in self.kernels:
            if name not in KERNEL_NAMES:
                raise UnknownKernelError(name)
        if not 0 <= self.error_budget <= 1:
            raise ValueError(f"an error budget of {self.error_budget:g} means nothing; wanted 0 (exact) to 1.")
        if not 0 <= self.from_percent < self.to_percent <= 100:
            raise ValueError(
                f"from_percent {self.from_percent:g} and to_percent {self.to_percent:g} leave nothing to do; "
                "wanted 0 to 100 with from_percent below to_percent."
            )

    @property
    def always(self) -> bool:
        """True where the rule holds at every step."""
        return self.from_percent <= 0 and self.to_percent >= 100

    def matches(self, call: AttentionCall) -> bool:
        """Does the rule speak about this call, the percent apart (that is settled once per forward)?"""
        return (
            call.q_len >= self.min_tokens
            and (self.kind is None or self.kind == call.kind)
            and (self.blocks is None or self._in_blocks(self.blocks, call))
        )

    def _in_blocks(self, blocks: BlockRange, call: AttentionCall) -> bool:
        # Where nobody can tell the block, an exact part is exact everywhere: better slow than wrong.
        return self.exact_only if blocks.unknown_to(call) else blocks.holds(call.block, call.blocks)


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules that stand on a model, in the order in which its nodes added them: the last that matches wins."""

    rules: tuple[Rule, ...] = ()

    def adding(self, *rules: Rule) -> Policy:
        return replace(self, rules=self.rules + rules)

    @property
    def timed(self) -> bool:
        """Is every call to be timed?"""
        return any(rule.timed for rule in self.rules)

    @property
    def depends_on_percent(self) -> bool:
        return not all(rule.always for rule in self.rules)

    def at_sigma(self, sigma: float, percent_to_sigma: Callable[[float], float]) -> frozenset[int]:
        """Indices of the rules in force at noise level `sigma`.

        `percent_to_sigma` maps 0…1 to a noise level, falling, as ComfyUI's `model_sampling.percent_to_sigma`. Both
        ends are included and numbers are compared in float32, as in ComfyUI's own nodes. Percent 0 is the beginning
        and 100 the end whatever the noise level: a flow model's percent 0 is 1.0, and custom sigmas or samplers that
        add noise (s_churn) begin above it.
        """
        sigma = _float32(sigma)

        def level(percent: float) -> float:
            return _float32(percent_to_sigma(percent / 100))

        return frozenset(
            index
            for index, rule in enumerate(self.rules)
            if (rule.from_percent <= 0 or sigma <= level(rule.from_percent))
            and (rule.to_percent >= 100 or sigma >= level(rule.to_percent))
        )

    @property
    def without_percent(self) -> frozenset[int]:
        """Indices of the rules that hold whatever the noise level: those in force where it is not known."""
        return frozenset(index for index, rule in enumerate(self.rules) if rule.always)
