"""Whatever the host can send, a routed call gives what the definition of attention gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_attune.attention.errors import measure_errors
from comfyui_attune.attention.kernel import machine_reasons
from comfyui_attune.attention.machine import Machine
from comfyui_attune.attention.policy import Policy, Rule
from comfyui_attune.attention.reference import reference_attention
from comfyui_attune.attention.router import Router
from comfyui_attune.attention.session import Forward, Session
from comfyui_attune.kernels import KERNELS

CPU = Machine()
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
EXACT_HERE = [kernel.name for kernel in KERNELS if kernel.exact and not machine_reasons(kernel, CPU)]

MASKS = {
    "none": None,
    "(M)": lambda b, h, n, m: (m,),
    "(N, M)": lambda b, h, n, m: (n, m),
    "(1, M)": lambda b, h, n, m: (1, m),
    "(B, M)": lambda b, h, n, m: (b, m),
    "(B, N, M)": lambda b, h, n, m: (b, n, m),
    "(1, N, M)": lambda b, h, n, m: (1, n, m),
    "(B, 1, M)": lambda b, h, n, m: (b, 1, m),
    "(B·H, N, M)": lambda b, h, n, m: (b * h, n, m),
    "(B, H, N, M)": lambda b, h, n, m: (b, h, n, m),
    "(B, 1, N, M)": lambda b, h, n, m: (b, 1, n, m),
    "(1, H, N, M)": lambda b, h, n, m: (1, h, n, m),
    "(1, 1, N, M)": lambda b, h, n, m: (1, 1, n, m),
    "(B, 1, 1, M)": lambda b, h, n, m: (b, 1, 1, m),
    "(B, H, N, 1)": lambda b, h, n, m: (b, h, n, 1),
}
LAYOUTS = ("(B, N, H·D)", "(B, H, N, D)", "q, k (B, N, H·D), v (B, N, H, D)")
DTYPES = {"float32": (torch.float32,) * 3, "float16": (torch.float16,) * 3, "bfloat16": (torch.bfloat16,) * 3}
MIXED = {
    "q float16, k and v float32": (torch.float16, torch.float32, torch.float32),
    "q and k float32, v bfloat16": (torch.float32, torch.float32, torch.bfloat16),
}
ALL_DTYPES = {**DTYPES, **MIXED}
SCALES = {"absent": "absent", "none": None, "positive": 0.3, "negative": -0.2}


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    dtype: str
    layout: str
    skip_output: bool
    mask: str
    mask_kind: str
    scale: str
    strided: bool
    heads_by_keyword: bool
    seed: int


@st.composite
def cases(draw):
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    groups = draw(st.sampled_from([group for group in (1, 2, 3) if heads % group == 0]))
    batch, q_len = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 5, 8, 17, 33]))
    mask = draw(st.sampled_from(list(MASKS)))
    if mask == "(B, M)" and (batch == 1 or batch == q_len):
        mask = "(N, M)"  # the host reads those as (N, M)
    return Case(
        batch=batch,
        heads=heads,
        kv_heads=heads // groups,
        q_len=q_len,
        kv_len=draw(st.sampled_from([q_len, 1, 7, 16, 40])),
        dim=draw(st.sampled_from([8, 40, 64, 72])),
        dtype=draw(st.sampled_from(list(ALL_DTYPES))),
        layout=draw(st.sampled_from(LAYOUTS)),
        skip_output=draw(st.booleans()),
        mask=mask,
        mask_kind=draw(st.sampled_from(["bool", "float"])),
        scale=draw(st.sampled_from(list(SCALES))),
        strided=draw(st.booleans()),
        heads_by_keyword=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory that is not contiguous."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    wide[..., ::2] = tensor
    return wide[..., ::2]


def build(case: Case):
    """(host arguments, host keyword arguments, what attention is by definition)."""
    generator = torch.Generator().manual_seed(case.seed)
    dtypes = ALL_DTYPES[case.dtype]
    shapes = [
        (case.batch, case.heads, case.q_len, case.dim),
        (case.batch, case.kv_heads, case.kv_len, case.dim),
        (case.batch, case.kv_heads, case.kv_len, case.dim),
    ]
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s, dtype in zip(shapes, dtypes, strict=True))
    kwargs = {}
    if case.scale != "absent":
        kwargs["scale"] = SCALES[case.scale]
    if case.kv_heads != case.heads:
        kwargs["enable_gqa"] = True
    mask = full = None
    if MASKS[case.mask] is not None:
        shape = MASKS[case.mask](case.batch, case.heads, case.q_len, case.kv_len)
        if case.mask_kind == "bool":
            mask = torch.rand(shape, generator=generator) < 0.7
            mask[..., 0] = True  # no row without a key: what that gives is a convention, tested elsewhere
        else:
            mask = torch.randn(shape, generator=generator).to(dtypes[0])
        full = as_four(case, mask)
        kwargs["mask"] = mask
    expected = reference_attention(q, k, v, mask=full, scale=kwargs.get("scale"))
    if case.layout == "(B, H, N, D)":
        tensors = [q, k, v]
        kwargs["skip_reshape"] = True
    else:
        tensors = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
        if "v (B" in case.layout:
            tensors[2] = v.transpose(1, 2).contiguous()
    if case.strided:
        tensors = [strided(t) for t in tensors]
    if case.skip_output:
        kwargs["skip_output_reshape"] = True
    else:
        expected = expected.transpose(1, 2).flatten(2)
    args = list(tensors)
    if case.heads_by_keyword:
        kwargs["heads"] = case.heads
    else:
        args.append(case.heads)
    return args, kwargs, expected


def as_four(case: Case, mask: torch.Tensor) -> torch.Tensor:
    """The mask as (B or 1, H or 1, N or 1, M or 1), by its name and not by the code under test."""
    batch, heads, q_len, kv_len = case.batch, case.heads, case.q_len, case.kv_len
    match case.mask:
        case "(M)":
            return mask.reshape(1, 1, 1, kv_len)
        case "(N, M)" | "(1, M)":
            return mask[None, None]
        case "(B, M)":
            return mask.reshape(batch, 1, 1, kv_len)
        case "(B·H, N, M)":
            return mask.reshape(batch, heads, q_len, kv_len)
    return mask[:, None] if mask.ndim == 3 else mask


def host(*_args, **_kwargs):
    raise AssertionError("the host was asked, although a kernel can compute this")


counts: Counter[tuple[str, str]] = Counter()


@pytest.mark.parametrize("name", EXACT_HERE)
@settings(max_examples=300)
@given(case=cases())
def test_a_routed_call_equals_the_reference(name, case):
    args, kwargs, expected = build(case)
    kept = [tensor.clone() for tensor in args[:3]]
    policy = Policy((Rule(("split",)), Rule((name,))))
    router = Router(policy, BY_NAME, CPU)
    session = Session(router)
    with Forward(router, session, frozenset({0, 1})):
        out = router(host, *args, **kwargs)
        again = router(host, *args, **kwargs)
    assert out.shape == expected.shape
    assert out.dtype == args[0].dtype
    assert torch.equal(out, again), "the cached plan gives another result"
    for before, after in zip(kept, args[:3], strict=True):
        assert torch.equal(before, after), "the caller's tensors were written to"
    ran = next(iter(session.record.observed()))
    narrow = min((*ALL_DTYPES[case.dtype], out.dtype), key=lambda dtype: -torch.finfo(dtype).eps)
    assert measure_errors(out, expected).l2 <= BY_NAME[ran].tolerance[narrow], (ran, case)
    counts["kernel that ran", ran] += 1
    counts["mask", case.mask if case.mask == "none" else f"{case.mask} {case.mask_kind}"] += 1
    counts["layout", case.layout] += 1
    counts["output", "(B, H, N, D)" if case.skip_output else "(B, N, H·D)"] += 1
    counts["dtype", case.dtype] += 1
    counts["heads", "grouped" if case.kv_heads != case.heads else "plain"] += 1
    counts["scale", case.scale] += 1
    counts["kind", "self" if case.q_len == case.kv_len else "cross"] += 1
    counts["memory", "strided" if case.strided else "contiguous"] += 1


def test_every_case_occurred(capsys):
    """Runs after the property; a case that no example held would have tested nothing."""
    if not counts:
        pytest.skip("the property above was not run")
    masks = ["none", *(f"{name} {kind}" for name in MASKS if name != "none" for kind in ("bool", "float"))]
    wanted = {
        "kernel that ran": EXACT_HERE,
        "mask": masks,
        "layout": LAYOUTS,
        "output": ["(B, H, N, D)", "(B, N, H·D)"],
        "dtype": ALL_DTYPES,
        "heads": ["plain", "grouped"],
        "scale": SCALES,
        "kind": ["self", "cross"],
        "memory": ["strided", "contiguous"],
    }
    with capsys.disabled():
        print()
        for what, names in wanted.items():
            print(f"  {what}: " + ", ".join(f"{name} ×{counts[what, name]}" for name in names))
    missing = [(what, name) for what, names in wanted.items() for name in names if not counts[what, name]]
    assert not missing
