"""attune_int8 and attune_bf16 in Triton's interpreter, on the CPU, against float64; and what they refuse and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standins.cases import BF16, BY_NAME, DTYPES, F16, F32, MASKS, WHOLE, Case, pretended, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_attune.attention.call import AttentionCall, Layout, Mask
from comfyui_attune.attention.errors import measure_errors
from comfyui_attune.attention.kernel import reasons_against
from comfyui_attune.attention.reference import reference_attention
from support.interpreter import WHY_NOT, Interpreter

needs_triton = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
_ = WHOLE
OURS = ("attune_int8", "attune_bf16")
Attend = Any  # (kernel, q, k, v, mask=, scale=, tile=) → output, all of them (B, H, tokens, D)


@pytest.fixture(scope="module")
def attend() -> Iterator[Attend]:
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    child = Interpreter()

    def run(kernel: str, *qkv: torch.Tensor, **options: Any) -> torch.Tensor:
        return child.attend(kernel, *(tensor.transpose(1, 2) for tensor in qkv), **options).transpose(1, 2)

    run.ask = child.ask  # type: ignore[attr-defined]
    yield run
    child.stop()


def inputs(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of one shape (B, H, tokens, D): noise."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *shape, generator=generator).to(dtype)
    return q, k, v


def tolerance(kernel: str, case: Case) -> float:
    """Relative L2. Rounding scores to 8 bits is an error that grows with them, and weights grow exponentially."""
    allowed = BY_NAME[kernel].tolerance[case.dtype]
    if kernel == "attune_bf16":
        return allowed
    return allowed * max(1.0, abs(case.scale or 0) * math.sqrt(case.d))


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> tuple[Case, dict[str, Any]]:
    """A call, and the tile that it runs with."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    dim = draw(st.sampled_from((1, 8, 20, 40, 64, 72, 96, 128, 160, 256)))
    case = Case(
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        n=draw(st.integers(1, 90)),
        m=draw(st.integers(1, 200)),
        d=dim,
        mask=draw(st.none() | st.sampled_from(MASKS)),
        mask_dtype=draw(st.sampled_from((torch.bool, F16, BF16, F32))),
        scale=draw(st.none() | st.floats(-2, 2, width=32).map(lambda x: x / math.sqrt(dim))),
        memory=draw(st.sampled_from(("host", "contiguous", "packed", "columns", "odd"))),
        kind=draw(st.sampled_from(("normal", "structured", "bias_k", "bias_v", "spike_k"))),
    )
    tile = {"bm": draw(st.sampled_from((32, 64, 128))), "bn": draw(st.sampled_from((32, 64, 128)))}
    tile |= {"fp8": draw(st.booleans()), "tma": draw(st.booleans())}
    return case, {**tile, "rotate": draw(st.sampled_from((True, True, False)))}


# An example is a call of a child process, whose time says nothing.
few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check_case(attend: Attend, kernel: str, case: Case, tile: dict[str, Any]) -> None:
    q, k, v, mask = tensors(case, Layout.BHND)
    out = attend(kernel, q, k, v, mask=mask, scale=case.scale, tile=tile)
    assert out.dtype is case.dtype and out.shape == q.shape
    error = relative_error(out, q, k, v, mask, case.scale)
    assert error <= tolerance(kernel, case), f"{case} {tile}: relative L2 error {error:.2g}"


def relative_error(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> float:
    """L2 error over the output's norm and, where outputs are few, what it would be if nothing cancelled out.

    Of two values that nearly cancel out, rounding leaves nothing right; among many outputs that is nothing.
    """
    options: dict[str, Any] = {"mask": mask, "scale": scale, "dtype": torch.float64}
    wanted, most = reference_attention(q, k, v, **options), reference_attention(q, k, v.abs(), **options)
    share = min(1.0, 4 / math.sqrt(out.numel()))
    return float((out.double() - wanted).norm() / (wanted.norm() + share * most.norm()).clamp_min(1e-300))


@few
@given(drawn=cases(DTYPES))
def test_int8_is_right_whatever_the_call(attend, drawn) -> None:
    check_case(attend, "attune_int8", *drawn)


@few
@given(drawn=cases((F16, BF16)))
def test_bf16_is_right_whatever_the_call(attend, drawn) -> None:
    check_case(attend, "attune_bf16", *drawn)


@pytest.mark.parametrize("kernel", OURS)
@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, m=1, d=64, heads=1, kv_heads=1),
        Case(n=9, m=2, d=64, heads=2, kv_heads=1, kind="normal"),  # of few keys one too many weighs
        Case(n=65, m=129, d=128, heads=2, kv_heads=1, batch=1),
        Case(n=130, m=128, d=96, heads=2, kv_heads=2, batch=1, dtype=BF16),
        Case(n=5, m=300, d=256, heads=1, kv_heads=1, batch=1),
        Case(n=9, m=21, kv_heads=2, mask=(_, _, _, _), mask_dtype=F16, memory="odd"),
        Case(n=33, m=70, heads=2, kv_heads=2, mask=(_, 1, 1, _), memory="columns", scale=-0.3),
        Case(n=33, m=70, heads=2, kv_heads=2, mask=(1, 1, _, 1), mask_dtype=F32, memory="packed", scale=0.0),
        Case(n=33, m=70, heads=2, kv_heads=2, batch=1, scale=1e-300),
    ],
    ids=str,
)
def test_calls_that_must_never_be_missed(attend, kernel: str, case: Case) -> None:
    check_case(attend, kernel, case, {})


@pytest.mark.parametrize("kernel", OURS)
def test_the_same_input_gives_the_same_bits_in_whatever_order_programs_run(attend, kernel: str) -> None:
    q, k, v = inputs(1, 2, 300, 64, dtype=F16)
    assert torch.equal(attend(kernel, q, k, v), attend(kernel, q, k, v, backwards=True))


@pytest.mark.parametrize(
    ("kernel", "memory", "fits"),
    [
        ("attune_int8", "odd", True),  # its descriptors are of its own buffers
        ("attune_bf16", "host", True),
        ("attune_bf16", "contiguous", True),
        ("attune_bf16", "columns", False),
        ("attune_bf16", "odd", False),
    ],
)
def test_tensor_descriptors_are_used_where_strides_allow_and_change_no_bit(attend, kernel, memory, fits) -> None:
    case = Case(batch=1, heads=2, kv_heads=2, m=100, d=72, memory=memory, mask=(1, 1, _, _))
    q, k, v, mask = tensors(case, Layout.BNHD)
    for fp8 in (True, False) if kernel == "attune_int8" else (False,):
        options: dict[str, Any] = {"mask": mask, "scale": None}
        tile = {"bn": 32, "fp8": fp8}
        wanted, none = attend.ask("descriptor loads", kernel, q, k, v, **options, tile=tile)
        out, loads = attend.ask("descriptor loads", kernel, q, k, v, **options, tile={**tile, "tma": True})
        assert torch.equal(out, wanted)
        assert not none and bool(loads) is fits


@pytest.mark.parametrize("kernel", OURS)
@pytest.mark.parametrize("broadcast", [True, False], ids=["padding", "by query"])
def test_a_row_without_keys_is_zero_as_in_pytorch(attend, kernel: str, broadcast: bool) -> None:
    q, k, v = inputs(2, 2, 40, 64, dtype=F16)
    mask = torch.ones(2, 1, 1 if broadcast else 40, 40, dtype=torch.bool)
    mask[1, :, :1] = False
    for given_mask in (mask, torch.where(mask, 0.0, -math.inf).half()):
        out = attend(kernel, q, k, v, mask=given_mask)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given_mask)
        assert torch.equal(out[1, :, :1], torch.zeros_like(out[1, :, :1]))
        assert torch.allclose(out.float(), wanted.float(), atol=0.05)


@pytest.mark.parametrize("kernel", OURS)
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_a_row_of_the_most_negative_number_counts_all_keys_alike(attend, kernel: str, dtype: torch.dtype) -> None:
    """So do models hide padding; nothing hidden by -inf may come back with it."""
    q, k, v = inputs(1, 1, 40, 64, dtype=F16)
    mask = torch.zeros(1, 1, 40, 40, dtype=dtype)
    mask[..., 7, :] = torch.finfo(dtype).min
    mask[..., 8, 20:] = torch.finfo(dtype).min
    mask[..., 9, :20] = -math.inf
    wanted = torch.nn.functional.scaled_dot_product_attention(*(t.float() for t in (q, k, v)), attn_mask=mask.float())
    if dtype is not F16:  # fp16's is a number like others
        assert torch.allclose(wanted[..., 7, :], v.float().mean(2), atol=1e-6)
    assert torch.allclose(attend(kernel, q, k, v, mask=mask).float(), wanted, atol=0.05)


def extremes(dtype: torch.dtype, length: int) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """Finite inputs that have broken kernels, or could; so many tokens that a loop over blocks of them turns."""
    largest = torch.finfo(dtype).max
    q, k, v = inputs(1, 1, length, 64, dtype=dtype)
    signs = tuple(t.sign() * largest for t in (q, k, v))
    one = k.clone()
    one[:, :, 13] = largest
    some = q.clone()
    some[:, :, ::3] = 0
    yield "rows of zeros", (some, k, v)
    yield "all zeros", (q * 0, k * 0, v * 0)
    yield "constant keys", (q, torch.full_like(k, 3.0), v)
    yield "constant values", (q, k, torch.full_like(v, -largest))
    yield "one huge key", (q, one, v)
    yield "one huge query", (one, k, v)
    yield "one huge value", (q, k, one)
    yield "largest queries", (signs[0], k, v)
    yield "largest queries on zeros", (signs[0], k * 0, v)
    yield "largest keys", (q, signs[1], v)
    yield "largest values", (q, k, signs[2])
    yield "largest numbers", signs
    yield "largest numbers, one sign", tuple(t.abs() for t in signs)
    yield "smallest numbers", tuple(t.sign() * torch.finfo(dtype).tiny for t in signs)


@pytest.mark.parametrize(("dtype", "fp8"), [*((dtype, True) for dtype in DTYPES), (F32, False)])
def test_finite_inputs_give_finite_outputs_within_the_values(attend, dtype: torch.dtype, fp8: bool) -> None:
    tile = {"bm": 128, "bn": 32, "fp8": fp8}
    for name, (q, k, v) in extremes(dtype, length=75):
        for scale in (None, -1e4, 1e300) if name.startswith(("largest", "all")) else (None,):
            within_the_values(attend("attune_int8", q, k, v, scale=scale, tile=tile), v, (name, scale))


def within_the_values(out: torch.Tensor, v: torch.Tensor, what: object) -> None:
    """An average lies among what it is of, but for rounding."""
    out, v = out.double(), v.double()
    assert torch.isfinite(out).all(), what
    room = 0.1 * (v.amax(2) - v.amin(2)) + 1e-2 * v.abs().amax(2)
    assert ((out.amax(2) <= v.amax(2) + room) & (out.amin(2) >= v.amin(2) - room)).all(), what


def test_one_huge_token_takes_all_the_weight_that_it_should(attend) -> None:
    q, k, v = inputs(1, 1, 70, 64, dtype=BF16)
    k[:, :, 13] = 1000 * k[:, :, 13]
    error = measure_errors(attend("attune_int8", q, k, v), reference_attention(q, k, v, dtype=torch.float64))
    assert error.l2 < 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(attend, bad: float) -> None:
    """8-bit numbers have no NaN: the healing of runs would never see that a model has gone wrong."""
    for place, spoilt in (("q", (0, 0, 5, slice(None))), ("k", (0, 0, slice(None), slice(None))), ("v", (..., 7))):
        qkv = dict(zip("qkv", inputs(1, 1, 70, 64, dtype=BF16), strict=True))
        qkv[place][0, 0, 5, 7] = bad
        out = attend("attune_int8", *qkv.values())
        assert not torch.isfinite(out[spoilt]).any(), place
        if place == "q":
            assert torch.isfinite(out[:, :, 6:]).all()


def test_e4m3_is_rounded_as_pytorch_rounds_it(attend) -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].sort().values
    between = (every[1:] + every[:-1]) / 2
    noise = torch.randn(512, generator=generator) * 10.0 ** torch.randint(-4, 3, (512,), generator=generator)
    x = torch.cat([every, between, between * 1.0001, between * 0.9999, noise, torch.tensor([1e9, -1e9])])
    x = torch.nn.functional.pad(x, (0, 2048 - len(x)))
    assert torch.equal(attend.ask("e4m3", x), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dim", [64, 128])
def test_a_constant_channel_of_any_model_changes_nothing(attend, dim: int) -> None:
    """Its mean is subtracted; what scores are cut by must not be reached because of it."""
    q, k, v = inputs(1, 1, 64, 300, dtype=F32)[0][..., :dim], *inputs(2, 1, 300, dim, dtype=F32, seed=1)[:2]
    q, k, v = q[:, :, :, :dim].contiguous(), k[:1].clone(), v[:1]
    k[..., 3] += 8192
    out = attend("attune_int8", q, k, v, tile={"fp8": False})
    assert relative_error(out, q, k, v, None, None) <= 0.05


@pytest.mark.parametrize("kernel", OURS)
def test_no_keys_at_all_give_zeros(attend, kernel: str) -> None:
    q, k, v = inputs(1, 2, 5, 64, dtype=F16)
    assert not attend(kernel, q, k[:, :, :0], v[:, :, :0]).any()


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "token", "head"])
@pytest.mark.parametrize("kernel", OURS)
def test_tensors_may_reach_beyond_two_to_the_31(attend, kernel: str, axis: int) -> None:
    """Strides that fit into 32 bits, and places that do not."""
    far, near = attend.ask("far apart", kernel, axis)
    assert torch.equal(far, near)


class Launches:
    """Stands in a kernel's place and writes down that it was launched."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid) and all(size < 65_536 for size in grid[1:])
        return lambda *_arguments, **_options: self.log.append(self.name)


class Allocations(TorchDispatchMode):
    """Bytes that PyTorch allocates, and by which operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.add(str(function))
        self.bytes.append(out.untyped_storage().nbytes())
        return out


@needs_triton
@pytest.mark.parametrize(("kernel", "most"), [("attune_int8", 3), ("attune_bf16", 1)])
@pytest.mark.parametrize("memory", ["side by side", "heads outside"])
def test_a_call_copies_nothing_and_launches_little(kernel: str, most: int, memory: str, monkeypatch) -> None:
    from comfyui_attune.kernels.int8 import launch

    log: list[str] = []
    for name in ("collect_statistics", "quantise", "attend", "attend_exact"):
        monkeypatch.setattr(launch, name, Launches(log, name))
    shape = (1, 75_600, 40, 128) if memory == "side by side" else (1, 40, 75_600, 128)
    q, k, v = (torch.empty(shape, dtype=BF16, device="meta") for _ in range(3))
    if memory != "side by side":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    function = launch.int8_attention if kernel == "attune_int8" else launch.exact_attention
    with Allocations() as allocated:
        out = function(q, k, v)
    assert len(log) == most
    assert allocated.names == {"aten.empty.memory_format"}
    extra = sum(allocated.bytes) - out.untyped_storage().nbytes()
    workspace = BY_NAME[kernel].workspace_bytes(AttentionCall(1, 40, 40, 75_600, 75_600, 128, 128, BF16, "cuda:0"))
    assert extra <= workspace
    if kernel == "attune_int8":
        quantised = 40 * 75_648 * (128 + 128 + 4)
        assert extra < 1.01 * quantised < workspace  # values in 8 bits; the declaration also covers those in 16


@needs_triton
@pytest.mark.parametrize("kernel", OURS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_graph_holds_the_kernel_as_one_operator(kernel: str, monkeypatch) -> None:
    from comfyui_attune.kernels.int8 import graph, launch

    def plainly(q, k, v, *, mask=None, scale=None):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out.transpose(1, 2).contiguous()

    name = {"attune_int8": "int8_attention", "attune_bf16": "exact_attention"}[kernel]
    monkeypatch.setattr(launch, name, plainly)
    monkeypatch.setattr(graph, "_NAMESPACE", f"attune_test_{kernel}")
    library = torch.library.Library(f"attune_test_{kernel}", "DEF")
    monkeypatch.setattr(graph, "_LIBRARY", library)
    run = graph._runner.__wrapped__(name)
    operators = []

    def backend(module, _inputs):
        operators.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module

    def model(q, k, v, mask):
        return run(q * 2, k, v, mask=mask, scale=0.3) + 1

    tensors = [torch.randn(2, 9, 4, 16) for _ in range(3)]
    mask = torch.rand(2, 1, 1, 9) > 0.2
    compiled = torch.compile(model, backend=backend, fullgraph=True)(*tensors, mask)
    assert torch.allclose(compiled, model(*tensors, mask))
    assert [name for name in operators if "attune" in name] == [f"attune_test_{kernel}.{name}.default"]
    library._destroy()


# What is asked for, the GPU, and each part that the reasons must have.
REFUSED: list[tuple[str, dict[str, Any], tuple[int, int] | None, dict[str, Any], tuple[str, ...]]] = [
    ("attune_int8", {}, (7, 5), {}, ("needs sm_80 or newer, this GPU is sm_75",)),
    ("attune_int8", {}, (9, 0), {"triton": None}, ("needs Triton, which is not installed",)),
    ("attune_int8", {}, (9, 0), {"packages": {"triton": "3.3.1"}}, ("needs triton 3.4 or newer, installed is 3.3.1",)),
    ("attune_int8", {}, None, {}, ("needs an NVIDIA GPU",)),
    ("attune_int8", {"head_dim": 264, "v_dim": 264}, (9, 0), {}, ("1 to 256, this is 264",)),
    ("attune_int8", {"v_dim": 32}, (9, 0), {}, ("values as wide as keys",)),
    ("attune_int8", {"dtype": torch.int32}, (9, 0), {}, ("the tensors are int32",)),
    ("attune_int8", {"dtype": torch.complex64}, (9, 0), {}, ("the tensors are complex64",)),
    ("attune_int8", {"dtype": torch.float64}, (9, 0), {}, ("the tensors are float64",)),
    ("attune_int8", {"lossy_allowed": False}, (9, 0), {}, ("is lossy",)),
    ("attune_int8", {"gradient": True}, (9, 0), {}, ("no backward pass",)),
    ("attune_bf16", {"dtype": F32}, (9, 0), {}, ("needs bfloat16, float16, the tensors are float32",)),
    (
        "attune_int8",
        {"head_dim": 300, "v_dim": 300, "dtype": torch.int8, "gradient": True},
        (7, 0),
        {"triton": None},
        ("this GPU is sm_70", "needs Triton", "this is 300", "the tensors are int8", "no backward pass"),
    ),
]


@pytest.mark.parametrize(("kernel", "call", "gpu", "changes", "parts"), REFUSED)
def test_what_cannot_run_is_refused_with_all_reasons(kernel, call, gpu, changes, parts) -> None:
    plain = {"head_dim": 128, "v_dim": 128, "dtype": BF16, "device": "cuda:0"}
    described = AttentionCall(1, 8, 8, 512, 512, **{**plain, **call})
    reasons = reasons_against(BY_NAME[kernel], described, pretended(gpu, **changes))
    assert len(reasons) == len(parts)
    for part in parts:
        assert part in "; ".join(reasons)


@pytest.mark.parametrize("gpu", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)])
@pytest.mark.parametrize("kernel", OURS)
def test_every_gpu_that_is_claimed_has_tiles_for_every_call(kernel: str, gpu: tuple[int, int]) -> None:
    from comfyui_attune.kernels.int8.tiles import EXACT, INT8, TOKENS, tile_for

    masked = Mask("bool", (1, 1, 512, 512))
    for dim, mask in ((1, None), (64, masked), (96, None), (128, masked), (256, None), (256, masked)):
        call = AttentionCall(1, 8, 2, 512, 512, dim, dim, BF16, "cuda:0", mask=mask)
        assert reasons_against(BY_NAME[kernel], call, pretended(gpu)) == ()
        tile = tile_for(INT8 if kernel == "attune_int8" else EXACT, gpu, dim, mask is not None)
        assert TOKENS % tile.bn == 0
        assert not tile.fp8 or gpu >= (8, 9)  # older GPUs have no e4m3
        assert not tile.tma or gpu >= (9, 0)
