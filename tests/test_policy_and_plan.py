"""Rules, percents, block ranges, and the decision they lead to."""

from __future__ import annotations

import pytest
import torch

from comfyui_attune.attention.call import AttentionCall, Layout, Undescribable, mask_shape
from comfyui_attune.attention.kernel import Kernel, Needs, reasons_against
from comfyui_attune.attention.machine import CPU, Architecture, Device, Machine, first_choices, nvidia_architecture
from comfyui_attune.attention.plan import RefusedError, expand, make_plan, refused_by_machine
from comfyui_attune.attention.policy import (
    FAMILIES,
    KERNEL_NAMES,
    BlockRange,
    BlockRangeError,
    Policy,
    Rule,
    UnknownKernelError,
    parse_blocks,
)

CALL = AttentionCall(1, 40, 40, 1000, 1000, 128, 128, torch.float16, "cuda:0", block=5, blocks=40)
H200 = Machine(devices=(Device("cuda:0", "NVIDIA H200", Architecture.HOPPER, (9, 0), 2**37), CPU))


def kernel(name: str, precision: str = "exact", package: str = "", **needs: object) -> Kernel:
    def load():
        raise AssertionError("a plan must not load anything")

    return Kernel(
        name=name,
        title=name,
        package=package,
        layout=Layout.BHND,
        precision=precision,
        tolerance={},
        load=load,
        needs=Needs(**needs),
    )


ALL = {
    k.name: k
    for k in (
        kernel("sdpa"),
        kernel("sdpa_cudnn"),
        kernel("flash2", package="flash_attn"),
        kernel("flash3", package="flash_attn_interface", sm=(((9, 0), (9, 0)),)),
        kernel("sage2_fp8_cuda", "lossy"),
        kernel("sage3", "lossy", sm=(((12, 0), (12, 1)),)),
    )
}


def chosen(*rules: Rule, call: AttentionCall = CALL, machine: Machine = H200, **more: object) -> str:
    return make_plan(call, rules, ALL, machine, **more).name


def test_the_last_matching_rule_wins_and_a_refused_one_falls_to_the_one_before():
    assert chosen(Rule(("sdpa",)), Rule(("sdpa_cudnn",))) == "sdpa_cudnn"
    assert chosen(Rule(("sage2_fp8_cuda",)), Rule(("sage3",))) == "sage2_fp8_cuda"
    assert chosen(Rule(("sage3",))) == "host"
    assert chosen() == "host"


def test_every_refusal_is_kept_with_all_its_reasons_both_wanted_and_found():
    plan = make_plan(CALL, [Rule(("sdpa",)), Rule(("sage3", "flash2"), source="118")], ALL, H200)
    assert [(d.kernel, d.source, d.accepted) for d in plan.decisions] == [
        ("sage3", "118", False),
        ("flash2", "118", False),
        ("sdpa", "", True),
    ]
    assert plan.decisions[0].reasons == ("needs sm_120 to sm_121, this GPU is sm_90 (Hopper)",)
    odd = kernel("odd", dtypes=frozenset({torch.float32}), head_dims=frozenset({64}), max_batch_heads=3)
    call = AttentionCall(2, 8, 2, 5, 7, 80, 40, torch.float16, "cuda:0", scale=0.5, lossy_allowed=False)
    assert reasons_against(odd, call, H200) == (
        "needs float32, the tensors are float16",
        "needs a head dimension of 64, this is 80",
        "needs values as wide as keys (80), they are 40",
        "has no grouped-query attention, the call has 8 heads on 2",
        "takes at most 3 batch·heads, this is 16",
    )


def test_rules_match_by_block_kind_and_length():
    cross = AttentionCall(1, 40, 40, 1000, 512, 128, 128, torch.float16, "cuda:0", block=5, blocks=40)
    assert chosen(Rule(("sdpa",), kind="cross")) == "host"
    assert chosen(Rule(("sdpa",), kind="cross"), call=cross) == "sdpa"
    assert chosen(Rule(("sdpa",), min_tokens=1001)) == "host"
    assert chosen(Rule(("sdpa",), blocks=BlockRange(6, 9))) == "host"
    assert chosen(Rule(("sdpa",), blocks=BlockRange(5, 5))) == "sdpa"
    assert chosen(Rule(("sdpa",), blocks=BlockRange(-35, -1))) == "sdpa"
    assert chosen(Rule(("sdpa",), blocks=BlockRange(-34, -1))) == "host"


def test_dense_parts_use_the_earlier_rules_exact_kernels_else_sdpa():
    dense = Rule(("sdpa",), blocks=BlockRange(0, 5), exact_only=True)
    assert chosen(Rule(("sage2_fp8_cuda",)), dense) == "sdpa"
    assert chosen(Rule(("sdpa_cudnn",)), Rule(("sage2_fp8_cuda",)), dense) == "sdpa_cudnn"
    assert chosen(Rule(("auto",)), dense) == "sdpa_cudnn"
    later = AttentionCall(1, 40, 40, 1000, 1000, 128, 128, torch.float16, "cuda:0", block=6, blocks=40)
    assert chosen(Rule(("sage2_fp8_cuda",)), dense, call=later) == "sage2_fp8_cuda"
    # a rule that comes after the dense one is not bound by it
    assert chosen(dense, Rule(("sage2_fp8_cuda",))) == "sage2_fp8_cuda"


def test_auto_follows_the_architecture_and_gives_way_to_a_launch_flag():
    assert chosen(Rule(("auto",))) == "sdpa_cudnn"  # flash3 comes first there, and is not installed
    assert chosen(Rule(("auto_fast",))) == "sage2_fp8_cuda"
    flag = Machine(devices=H200.devices, host_flag="--use-split-cross-attention")
    assert chosen(Rule(("auto",)), machine=flag) == "host"
    assert chosen(Rule(("sdpa",)), machine=flag) == "sdpa"
    assert expand("sage", H200) == FAMILIES["sage"]


def test_a_strict_rule_raises_and_names_everything():
    with pytest.raises(RefusedError, match=r"sage3: needs sm_120 to sm_121, this GPU is sm_90"):
        chosen(Rule(("sdpa",)), Rule(("sage3",), on_refusal="error"))
    assert refused_by_machine(["sage3", "flash2"], ALL, H200)
    assert not refused_by_machine(["sage3", "sdpa"], ALL, H200)
    assert not refused_by_machine(["auto"], ALL, H200)


def test_demotion_and_memory_are_reasons():
    assert chosen(Rule(("sdpa", "sdpa_cudnn")), unfit={"sdpa": "raised"}) == "sdpa_cudnn"


def test_names_are_checked_and_the_error_lists_them():
    with pytest.raises(UnknownKernelError, match=r"'sage4'.*sage3_per_block_mean.*basic"):
        Rule(("sage4",))


def test_option_lists_only_grow_at_the_end():
    """Shared workflows hold these names and their places; a change here breaks them."""
    assert tuple(KERNEL_NAMES[:27]) == (
        "auto", "auto_fast", "host", "sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "xformers",
        "xformers_cutlass", "flash", "flash2", "flash3", "flash4", "sage", "sage1", "sage2_fp16_triton",
        "sage2_fp16_cuda", "sage2_fp8_cuda", "sage2_fp8_cuda_pp", "sage3", "sage3_per_block_mean", "kitchen_int8",
        "attune_int8", "split", "sub_quad", "basic",
    )  # fmt: skip
    known = set(KERNEL_NAMES)
    assert all(known.issuperset(members) for members in FAMILIES.values())
    assert all(known.issuperset(first_choices(a, fast)) for a in Architecture for fast in (False, True))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("5-2", "runs backwards"),
        ("a-b", "is not a block range"),
        ("3-", "is not a block range"),
        ("-1", "is not a block range"),
        ("2-40", "goes beyond the model"),
        ("40", "goes beyond the model"),
    ],
)
def test_bad_block_ranges_say_what_a_range_is(text, wrong):
    with pytest.raises(BlockRangeError, match=f"{wrong}.*2-37.*This model has 40 blocks, 0 to 39"):
        parse_blocks(text, 40)


def test_good_block_ranges():
    assert parse_blocks(" 2 - 37 ", 40) == BlockRange(2, 37)
    assert parse_blocks("7") == BlockRange(7, 7)
    assert parse_blocks("") is None
    assert not BlockRange(-2, -1).holds(3, None)
    assert not BlockRange(0, 3).holds(None, 40)


@pytest.mark.parametrize(("start", "end"), [(50, 50), (60, 40), (-1, 50), (0, 101), (float("nan"), 50)])
def test_empty_percent_ranges_are_refused(start, end):
    with pytest.raises(ValueError, match="wanted 0 to 100 with from_percent below to_percent"):
        Rule(("sdpa",), from_percent=start, to_percent=end)


def test_percent_is_a_noise_level_with_both_ends_in():
    policy = Policy((Rule(("sdpa",)), Rule(("sage3",), to_percent=50), Rule(("flash2",), from_percent=50)))

    def linear(percent: float) -> float:
        return 1 - percent

    assert policy.at_sigma(0.9, linear) == {0, 1}
    assert policy.at_sigma(0.5, linear) == {0, 1, 2}
    assert policy.at_sigma(0.1, linear) == {0, 2}
    assert policy.without_percent == {0}


def test_the_architecture_comes_from_the_capability():
    for capability, wanted in {
        (12, 0): Architecture.BLACKWELL_CONSUMER,  # an RTX 5090 is Blackwell, not Hopper
        (12, 1): Architecture.BLACKWELL_CONSUMER,
        (10, 0): Architecture.BLACKWELL_DATACENTER,
        (10, 3): Architecture.BLACKWELL_DATACENTER,
        (9, 0): Architecture.HOPPER,
        (8, 9): Architecture.ADA,
        (8, 6): Architecture.AMPERE,
        (7, 5): Architecture.TURING,
        (7, 0): Architecture.VOLTA,
        (6, 1): Architecture.PRE_VOLTA,
    }.items():
        assert nvidia_architecture(capability) is wanted


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (7, 8, 8), (1, 2, 3, 4, 5), (5,), ()])
def test_masks_that_fit_nothing_say_so(shape):
    with pytest.raises(Undescribable, match="does not broadcast to"):
        mask_shape(shape, batch=2, heads=4, q_len=8, kv_len=9)


def test_percent_limits_are_compared_in_float32_as_the_host_does():
    """Wan's shift 8 at 25 percent is 0.96; a sampler's float32 sigma there is 0.95999998."""
    rule = Policy((Rule(("sdpa",), to_percent=25),))
    sigma = float(torch.tensor(0.96, dtype=torch.float32))
    assert sigma < 0.96
    assert rule.at_sigma(sigma, lambda percent: 0.96 if percent == 0.25 else 1.0) == {0}


def test_percent_0_and_100_have_nothing_outside_them():
    """A flow model's percent 0 is 1.0; custom sigmas and samplers that add noise begin above it."""
    rules = (
        Rule(("sdpa",), to_percent=20),
        Rule(("flash2",), from_percent=80),
        Rule(("sage3",), from_percent=20, to_percent=80),
    )
    assert Policy(rules).at_sigma(1.1, lambda percent: 1 - percent) == {0}
    assert Policy(rules).at_sigma(0.0, lambda percent: 1.1 - percent) == {1}


def test_a_strict_selector_is_not_broken_by_the_dense_parts_of_a_switch():
    dense = Rule(("sdpa",), blocks=BlockRange(0, 9), exact_only=True, source="2")
    strict = Rule(("sage2_fp8_cuda",), on_refusal="error", source="1")
    assert chosen(strict, dense) == "sdpa"


def test_a_dense_part_is_exact_where_blocks_are_not_numbered():
    unnumbered = AttentionCall(1, 40, 40, 1000, 1000, 128, 128, torch.float16, "cuda:0")
    dense = Rule(("sdpa",), blocks=BlockRange(-2, -1), exact_only=True)
    assert chosen(Rule(("sage2_fp8_cuda",)), dense, call=unnumbered) == "sdpa"


def test_a_dense_part_does_not_trust_a_lossy_host():
    dense = Rule(("sdpa",), exact_only=True)
    sage = Machine(devices=H200.devices, host_attention="sage")
    assert chosen(Rule(("host",)), dense, machine=sage) == "sdpa"
    assert chosen(Rule(("host",)), dense) == "host"
