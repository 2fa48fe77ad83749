"""The stand-ins have the signatures, constraints and quirks of the packages they stand for."""

from __future__ import annotations

import importlib.metadata
import json
import math
from importlib import import_module

import pytest
import standins
import torch
from standins.read_signatures import parameters

DATA = json.loads((standins.HERE / "signatures.json").read_text(encoding="utf-8"))
# Distribution whose metadata a variant carries, where its name differs from the package its source was read from.
DISTRIBUTIONS = {"flash3": "flash-attn-3", "flash3_old": "flash-attn-3", "sage2": "sageattention", "sage3": "sageattn3"}
DISTRIBUTIONS["sage3_old"] = "sageattn3"


def entry_id(entry: dict) -> str:
    return f"{entry['standin'].partition('/')[0]}-{entry['function']}"


@pytest.mark.parametrize("entry", DATA["functions"], ids=entry_id)
def test_signature_is_that_of_the_real_function(entry: dict) -> None:
    source = (standins.HERE / entry["standin"]).read_text(encoding="utf-8")
    assert parameters(source, entry["function"]) == entry["parameters"]


@pytest.mark.parametrize("entry", DATA["functions"], ids=entry_id)
def test_every_signature_names_its_source(entry: dict) -> None:
    assert entry["package"] and entry["version"] and entry["file"]
    if entry["source"] == "package index":
        assert len(entry["sha256"]) == 64
    else:
        assert entry["source"] == "GitHub" and len(entry["commit"]) == 40 and entry["note"]


@pytest.mark.parametrize("variant", standins.VARIANTS)
def test_each_variant_has_a_source_and_the_metadata_of_its_version(variant: str) -> None:
    entries = [e for e in DATA["functions"] if e["standin"].startswith(f"{variant}/")]
    assert entries, f"signatures.json says nothing of {variant}"
    name = DISTRIBUTIONS.get(variant, entries[0]["package"])
    with standins.installed(variant):
        version = importlib.metadata.version(name)
    if variant not in ("flash3", "flash3_old"):  # FlashAttention 3 lies in flash-attn's archive with its own version
        assert version == entries[0]["version"]


def test_facts_without_a_source_are_marked_as_not_verified() -> None:
    for fact in DATA["facts"]:
        assert fact["variant"] in standins.VARIANTS and fact["fact"]
        assert fact["verified"] is (fact["source"] != "not read")


def test_importing_a_variant_leaves_nothing_behind() -> None:
    import sys

    before = list(sys.path)
    with standins.installed("sage1"):
        assert import_module("sageattention").CALLS == []
    assert "sageattention" not in sys.modules or "sage1" not in str(sys.modules["sageattention"].__file__)
    assert sys.path == before
    with pytest.raises(KeyError, match="no stand-in called sage9"), standins.installed("sage9"):
        pass


def qkv(*, heads: int = 2, kv_heads: int = 2, n: int = 7, m: int = 9, d: int = 64, dtype=torch.float16, layout="BNHD"):
    """Random q, k, v in `layout`, contiguous."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, heads, d), (2, m, kv_heads, d), (2, m, kv_heads, d)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.transpose(1, 2).contiguous() for t in tensors] if layout == "BHND" else tensors


def reference(q, k, v, scale=None):
    """Plain float32 attention of (B, N, H, D)."""
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v).transpose(1, 2)


# variant, module, function, layout, the keyword for the scale, dtypes
FUNCTIONS = [
    ("sage1", "sageattention", "sageattn", "BNHD", "sm_scale", {"tensor_layout": "NHD"}),
    ("sage1", "sageattention", "sageattn", "BHND", "sm_scale", {"tensor_layout": "HND"}),
    ("sage2", "sageattention", "sageattn_qk_int8_pv_fp16_triton", "BNHD", "sm_scale", {"tensor_layout": "NHD"}),
    ("sage2", "sageattention", "sageattn_qk_int8_pv_fp16_cuda", "BNHD", "sm_scale", {"tensor_layout": "NHD"}),
    ("sage2", "sageattention", "sageattn_qk_int8_pv_fp8_cuda", "BHND", "sm_scale", {}),
    ("sage2", "sageattention", "sageattn_qk_int8_pv_fp8_cuda_sm90", "BHND", "sm_scale", {}),
    ("sage2", "sageattention", "sageattn", "BHND", "sm_scale", {}),
    ("sage3", "sageattn3", "sageattn3_blackwell", "BHND", None, {}),
    ("sage3_old", "sageattn3.api", "sageattn3_blackwell", "BHND", None, {"per_block_mean": False}),
    ("flash2", "flash_attn", "flash_attn_func", "BNHD", "softmax_scale", {}),
    ("flash3", "flash_attn_interface", "flash_attn_func", "BNHD", "softmax_scale", {}),
    ("flash3_old", "flash_attn_interface", "flash_attn_func", "BNHD", "softmax_scale", {}),
    ("flash4", "flash_attn.cute.interface", "flash_attn_func", "BNHD", "softmax_scale", {}),
    ("xformers", "xformers.ops", "memory_efficient_attention", "BNHD", "scale", {}),
    ("kitchen", "comfy_kitchen", "int8_attention", "BHND", "scale", {}),
]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: f"{row[0]}-{row[2]}-{row[3]}")
def test_a_stand_in_computes_attention_of_what_it_was_given(row, scaled: bool) -> None:
    variant, module, name, layout, scale_name, extra = row
    q, k, v = qkv(layout=layout)
    extra = {**extra, scale_name: 0.3} if scaled and scale_name else extra
    views = [t.transpose(1, 2) if layout == "BHND" else t for t in (q, k, v)]
    wanted = reference(*views, scale=0.3 if scaled and scale_name else None)
    with standins.installed(variant):
        out = getattr(import_module(module), name)(q, k, v, **extra)
    out = out[0] if isinstance(out, tuple) else out
    out = out.transpose(1, 2) if layout == "BHND" else out
    assert out.dtype is torch.float16
    assert (out.float() - wanted).norm() < 4e-3 * wanted.norm()


@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: f"{row[0]}-{row[2]}-{row[3]}")
def test_a_wrong_layout_is_never_forgiven(row) -> None:
    variant, module, name, layout, _, extra = row
    q, k, v = qkv(heads=4, kv_heads=4, n=4, m=4, layout="BNHD" if layout == "BHND" else "BHND")
    views = [t.transpose(1, 2) if layout == "BNHD" else t for t in (q, k, v)]
    wanted = reference(*views)
    with standins.installed(variant):
        out = getattr(import_module(module), name)(q, k, v, **extra)
    out = out[0] if isinstance(out, tuple) else out
    out = out.transpose(1, 2) if layout == "BNHD" else out
    assert (out.float() - wanted).norm() > 0.1 * wanted.norm()


def test_unknown_keywords_and_masks_are_swallowed_by_sage_and_refused_by_flash() -> None:
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[:, :2] = True
    for variant, module, name, layout, _, extra in FUNCTIONS:
        q, k, v = qkv(layout=layout)
        with standins.installed(variant):
            function = getattr(import_module(module), name)
            if variant.startswith("sage"):
                plain = function(q, k.clone(), v, **extra)
                assert torch.equal(function(q, k.clone(), v, attn_mask=mask, no_such_thing=1, **extra), plain)
            else:
                with pytest.raises(TypeError, match="unexpected keyword"):
                    function(q, k, v, no_such_thing=1, **extra)


@pytest.mark.parametrize("variant", ["sage1", "sage3", "sage3_old"])
def test_sage_1_and_3_change_k_in_place(variant: str) -> None:
    q, k, v = qkv(layout="BHND")
    before = k.clone()
    with standins.installed(variant):
        if variant == "sage1":
            import_module("sageattention").sageattn(q, k, v)
        else:
            import_module("sageattn3.api").sageattn3_blackwell(q, k, v)
    assert not torch.equal(k, before)
    assert k.float().mean(dim=2).abs().max() < 1e-2


def test_sage3_has_no_scale_no_grouped_queries_and_two_head_dimensions() -> None:
    with standins.installed("sage3"):
        attend = import_module("sageattn3").sageattn3_blackwell
        q, k, v = qkv(layout="BHND")
        assert torch.equal(attend(q, k.clone(), v, scale=9.0, sm_scale=9.0), attend(q, k.clone(), v))
        with pytest.raises(RuntimeError, match="MQA/GQA"):
            attend(*qkv(kv_heads=1, layout="BHND"))
        with pytest.raises(ValueError, match="Unsupported head dim: 96"):
            attend(*qkv(d=96, layout="BHND"))


def test_old_sage3_is_found_in_its_api_module_only() -> None:
    with standins.installed("sage3_old"):
        assert not hasattr(import_module("sageattn3"), "sageattn3_blackwell")
        assert callable(import_module("sageattn3.api").sageattn3_blackwell)


def test_flash_3_may_and_flash_4_does_return_a_tuple() -> None:
    with standins.installed("flash3"):
        assert isinstance(import_module("flash_attn_interface").flash_attn_func(*qkv()), torch.Tensor)
    with standins.installed("flash3_old"):
        assert len(import_module("flash_attn_interface").flash_attn_func(*qkv())) == 2
    with standins.installed("flash4"):
        out, lse = import_module("flash_attn.cute").flash_attn_func(*qkv())
        assert lse is None and out.shape == (2, 7, 2, 64)
        assert not hasattr(import_module("flash_attn"), "flash_attn_func")


def test_a_negative_scale_breaks_flash_as_it_breaks_the_real_one() -> None:
    q, k, v = (t * 8 for t in qkv())
    with standins.installed("flash2"):
        out = import_module("flash_attn").flash_attn_func(q, k, v, softmax_scale=-1.0)
    assert not math.isfinite(out.float().norm())


@pytest.mark.parametrize(
    ("variant", "module", "name", "changes", "error", "words"),
    [
        ("sage1", "sageattention", "sageattn", {"d": 80}, AssertionError, "headdim should be in"),
        ("sage1", "sageattention", "sageattn", {"dtype": torch.float64}, AssertionError, "must be in dtype"),
        ("sage2", "sageattention", "sageattn", {"dtype": torch.float32}, AssertionError, "must be in dtype"),
        ("sage2", "sageattention", "sageattn", {"d": 136}, ValueError, "Unsupported head_dim: 136"),
        ("sage3", "sageattn3", "sageattn3_blackwell", {"dtype": torch.float32}, RuntimeError, "failed to dispatch"),
        ("flash2", "flash_attn", "flash_attn_func", {"dtype": torch.float32}, RuntimeError, "fp16 and bf16"),
        ("flash2", "flash_attn", "flash_attn_func", {"d": 264}, RuntimeError, "at most 256"),
        ("flash2", "flash_attn", "flash_attn_func", {"heads": 3}, RuntimeError, "must divide"),
        ("flash3", "flash_attn_interface", "flash_attn_func", {"d": 20}, RuntimeError, "multiple of 8"),
        ("flash4", "flash_attn.cute", "flash_attn_func", {"d": 20}, AssertionError, "is not supported on SM90"),
        ("xformers", "xformers.ops", "memory_efficient_attention", {"d": 20}, NotImplementedError, "% 8 != 0"),
        ("xformers", "xformers.ops", "memory_efficient_attention", {"heads": 4}, ValueError, "Incompatible shapes"),
        ("kitchen", "comfy_kitchen", "int8_attention", {"d": 264}, ValueError, "head_dim must be in"),
        ("kitchen", "comfy_kitchen", "int8_attention", {"dtype": torch.float64}, TypeError, "must be float32"),
    ],
)
def test_limits_are_those_of_the_real_package(variant, module, name, changes, error, words) -> None:
    layout = "BNHD" if variant.startswith(("flash", "xformers")) else "BHND"
    with standins.installed(variant), pytest.raises(error, match=words):
        getattr(import_module(module), name)(*qkv(layout=layout, **changes))


@pytest.mark.parametrize(
    ("variant", "module", "name", "sm", "words"),
    [
        ("flash2", "flash_attn", "flash_attn_func", "75", "Ampere GPUs or newer"),
        ("flash3", "flash_attn_interface", "flash_attn_func", "120", "no kernel image"),
        ("flash4", "flash_attn.cute", "flash_attn_func", "75", "Unsupported compute capability"),
        ("sage2", "sageattention", "sageattn", "100", "Unsupported CUDA architecture: sm100"),
        ("sage2", "sageattention", "sageattn_qk_int8_pv_fp8_cuda_sm90", "89", "SM90 kernel is not available"),
        ("sage3", "sageattn3", "sageattn3_blackwell", "103", "Blackwell"),
        ("kitchen", "comfy_kitchen", "int8_attention", "70", "SM75 or newer"),
    ],
)
def test_a_gpu_that_the_real_package_refuses_is_refused(monkeypatch, variant, module, name, sm, words) -> None:
    monkeypatch.setenv("ATTUNE_STANDIN_SM", sm)
    layout = "BNHD" if variant.startswith("flash") else "BHND"
    with standins.installed(variant), pytest.raises(Exception, match=words):
        getattr(import_module(module), name)(*qkv(layout=layout))


def test_sage_wants_the_last_dimension_contiguous() -> None:
    for variant, module, name, layout, _, extra in FUNCTIONS:
        if variant not in ("sage1", "sage2", "kitchen"):
            continue
        q, k, v = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in qkv(layout=layout))
        with standins.installed(variant), pytest.raises((AssertionError, ValueError), match=r"[Ll]ast dim"):
            getattr(import_module(module), name)(q, k, v, **extra)


def test_xformers_wants_biases_whole_and_aligned() -> None:
    with standins.installed("xformers"):
        attend = import_module("xformers.ops").memory_efficient_attention
        q, k, v = qkv()
        with pytest.raises(ValueError, match="Invalid shape for attention bias"):
            attend(q, k, v, attn_bias=torch.zeros(7, 9, dtype=q.dtype))
        odd = torch.zeros(2, 2, 7, 9, dtype=q.dtype)
        with pytest.raises(NotImplementedError, match=r"attn_bias\.stride\(-2\) % 8 != 0"):
            attend(q, k, v, attn_bias=odd)
        padded = torch.zeros(2, 2, 7, 16, dtype=q.dtype)[..., :9]
        assert attend(q, k, v, attn_bias=padded).shape == q.shape
        with pytest.raises(RuntimeError, match="should match query's dtype"):
            attend(q, k, v, attn_bias=torch.zeros(2, 2, 7, 16)[..., :9])


def test_xformers_on_blackwell_has_flash_only(monkeypatch) -> None:
    monkeypatch.setenv("ATTUNE_STANDIN_SM", "120")
    with standins.installed("xformers"):
        ops = import_module("xformers.ops")
        assert ops.memory_efficient_attention(*qkv()).shape == (2, 7, 2, 64)
        assert ops.fmha.CALLS[-1]["op"].startswith("fa2F")
        with pytest.raises(NotImplementedError, match=r"capability <= \(9, 0\)"):
            ops.memory_efficient_attention(*qkv(dtype=torch.float32))
        with pytest.raises(ValueError, match="too new"):
            ops.memory_efficient_attention(*qkv(), op=ops.MemoryEfficientAttentionCutlassOp)


def test_an_accumulator_that_sage_does_not_know_gives_garbage_without_an_error() -> None:
    with standins.installed("sage2"):
        sage = import_module("sageattention")
        assert sage.sageattn_qk_int8_pv_fp8_cuda(*qkv(layout="BHND"), pv_accum_dtype="fp99").isnan().all()
        with pytest.raises(ValueError, match="Unsupported pv_accum_dtype"):
            sage.sageattn_qk_int8_pv_fp16_cuda(*qkv(layout="BHND"), pv_accum_dtype="fp99")
