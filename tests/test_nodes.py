"""The pack's nodes in a real ComfyUI server, through its API: validation, runs, caching, bad input."""

from __future__ import annotations

import uuid

import pytest
import torch

from comfyui_attune.attention.policy import KERNEL_NAMES
from support.loading import ROOT
from support.prompts import latent, node, rule, selector, switch, two_stage
from support.server import PromptFailedError, PromptRejectedError

OWN = {
    "AttentionSelector": [
        "model", "kernel", "precision", "when_unavailable", "cross_attention", "min_tokens", "error_budget",
        "time_calls",
    ],
    "SDPAForce": ["model", "first", "second", "third", "fourth", "strict"],
    "Sage3Switch": [
        "model", "enable", "per_block_mean", "dense_first_percent", "dense_last_percent", "dense_first_blocks",
        "dense_last_blocks", "preset",
    ],
    "AttentionRule": ["model", "kernel", "from_percent", "to_percent", "blocks", "kind"],
    "AttentionCapture": ["model", "blocks", "steps", "kind", "max_mib", "filename_prefix"],
}  # fmt: skip
OLD = {
    "Sage3AttentionOnlySwitch": ["model", "enable", "print_backend"],
    "PathchSageAttentionKJ": ["model", "sage_attention", "allow_compile"],
    "PatchFlashAttentionKJ": ["model", "allow_compile"],
}


@pytest.fixture(scope="module")
def clean(server):
    """The latent of the prompt without any node of the pack."""
    return latent(server.run(two_stage()))


def on_both(make):
    """A patch that puts `make(prompt, model, key)` on both stages, as nodes 20 and 21."""
    return lambda prompt, model, stage: make(prompt, model, str(20 + stage))


def nodes_of(result) -> dict:
    return {key: data for run in result.runs for key, data in run["nodes"].items()}


@pytest.mark.parametrize("name", [*OWN, *OLD])
def test_ids_order_tooltips_and_category_are_what_shared_workflows_hold(server, name):
    info = server.object_info()[name]
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert list(inputs)[: len({**OWN, **OLD}[name])] == {**OWN, **OLD}[name]
    assert all(spec[1].get("tooltip") for spec in inputs.values())
    assert info["category"] == "attention" and len(info["description"]) > 40
    assert info["output"] == ["MODEL"]
    assert info.get("deprecated", False) is (name in OLD)


def test_option_lists_hold_every_name_on_every_machine(server):
    inputs = server.object_info()["AttentionSelector"]["input"]["required"]
    assert inputs["kernel"][1]["options"] == list(KERNEL_NAMES)
    assert inputs["cross_attention"][1]["options"] == ["same", *KERNEL_NAMES]
    assert server.object_info()["AttentionRule"]["input"]["required"]["kernel"][1]["options"] == list(KERNEL_NAMES)


@pytest.mark.parametrize("name", ["sdpa", "sdpa_flash", "sdpa_math", "split", "sub_quad", "basic"])
def test_the_selector_runs_what_it_names_and_the_video_is_the_same(server, clean, name):
    result = server.run(two_stage(on_both(lambda p, m, key: selector(p, m, key, name))))
    assert [run["observed"] for run in result.runs] == [{name: 8}, {name: 8}]
    assert [run["sampler_node"] for run in result.runs] == ["12", "13"]
    assert nodes_of(result)["20"]["text"] == f"{name} ×8"
    assert torch.allclose(latent(result), clean, atol=1e-4)


def test_host_is_bit_equal_to_a_run_without_the_pack(server, clean):
    assert torch.equal(latent(server.run(two_stage(on_both(lambda p, m, key: selector(p, m, key, "host"))))), clean)


def test_a_disabled_switch_leaves_no_trace(server, clean):
    result = server.run(two_stage(on_both(lambda p, m, key: switch(p, m, key, enable=False))))
    assert result.runs == []
    assert torch.equal(latent(result), clean)


def test_what_cannot_run_falls_back_says_why_and_the_video_is_right(server, clean):
    result = server.run(two_stage(on_both(lambda p, m, key: switch(p, m, key))))
    data = nodes_of(result)["20"]
    assert data["observed"] == {"host": 8} and data["requested"] == "sage3"
    assert "package sageattn3 is not installed" in data["text"] and "needs a cuda device, this is cpu" in data["text"]
    assert "32 tokens" in data["text"] and "not worth it for 4 steps" in data["text"]
    assert torch.equal(latent(result), clean)


def test_a_stage_of_a_long_run_is_not_called_short(server):
    result = server.run(two_stage(on_both(lambda p, m, key: switch(p, m, key)), steps=20, split=10))
    assert all("steps" not in data["text"] for data in nodes_of(result).values())


def test_a_selector_under_a_refused_switch_decides(server):
    def patch(prompt, model, stage):
        return switch(prompt, selector(prompt, model, str(20 + stage), "split"), str(30 + stage))

    data = nodes_of(server.run(two_stage(patch)))
    assert data["30"]["observed"] == data["20"]["observed"] == {"split": 8}


def test_cross_attention_and_short_calls_can_be_sent_elsewhere(server):
    result = server.run(two_stage(on_both(lambda p, m, key: selector(p, m, key, "split", cross_attention="basic"))))
    assert result.runs[0]["observed"] == {"split": 4, "basic": 4}
    result = server.run(two_stage(on_both(lambda p, m, key: selector(p, m, key, "split", min_tokens=1000))))
    assert result.runs[0]["observed"] == {"host": 8}


def test_sdpa_force_keeps_its_order(server):
    def force(prompt, model, key, **inputs):
        chosen = {"first": "cudnn", "second": "math", "third": "none", "fourth": "none", "strict": False, **inputs}
        prompt[key] = node("SDPAForce", model=model, **chosen)
        return [key, 0]

    data = nodes_of(server.run(two_stage(on_both(force))))["20"]
    assert data["observed"] == {"sdpa_math": 8} and data["refused"][0]["kernel"] == "sdpa_cudnn"
    with pytest.raises(PromptFailedError, match="sdpa_cudnn: needs a cuda device, this is cpu") as caught:
        server.run(two_stage(on_both(lambda p, m, key: force(p, m, key, second="none", strict=True))))
    assert caught.value.node_id == "20"


def test_rules_by_block_kind_and_percent(server):
    def patch(prompt, model, stage):
        model = selector(prompt, model, str(20 + stage), "sdpa")
        model = rule(prompt, model, str(30 + stage), "split", blocks="1")
        return rule(prompt, model, str(40 + stage), "basic", kind="cross", to_percent=100.0)

    result = server.run(two_stage(patch))
    assert result.runs[0]["observed"] == {"sdpa": 2, "split": 2, "basic": 4}


def test_percent_holds_across_the_two_stages(server):
    def patch(prompt, model, stage):
        return rule(prompt, selector(prompt, model, str(20 + stage), "sdpa"), str(30 + stage), "split", to_percent=30.0)

    high, low = server.run(two_stage(patch, steps=8)).runs
    # shift 8, 8 steps: noise levels 1, .98, .96, .93, .89 | .83, .73, .53; percent 30 is .949
    assert high["observed"] == {"split": 12, "sdpa": 4}
    assert low["observed"] == {"sdpa": 16}


def test_dense_parts_run_the_exact_kernel(server):
    def patch(prompt, model, stage):
        model = selector(prompt, model, str(20 + stage), "split")
        return switch(prompt, model, str(30 + stage), dense_first_blocks=1, dense_last_percent=10.0)

    data = nodes_of(server.run(two_stage(patch)))
    assert data["30"]["observed"] == {"split": 8}
    assert all("keeps these calls exact" not in reason for r in data["30"]["refused"] for reason in r["reasons"])


PRESET_TEXTS = {
    "quality": "Preset quality: percent 0–20 and 80–100, the first 2 and the last 2 blocks stay exact.",
    "balanced": "Preset balanced: percent 0–10 and 90–100, the first and the last block stay exact.",
    "speed": "Preset speed: percent 0–3 and 94–100 stay exact.",
}


@pytest.mark.parametrize("preset", [*PRESET_TEXTS, "custom", None])
def test_a_preset_keeps_its_parts_exact_and_is_named_on_the_node(server, preset):
    """Exact parts run sdpa here, the others the host's attention, as there is no Sage3; the model has two blocks."""
    inputs = {} if preset is None else {"preset": preset}  # prompts from before there were presets have none
    high, low = server.run(two_stage(on_both(lambda p, m, key: switch(p, m, key, **inputs)), steps=20, split=10)).runs
    texts = high["nodes"]["20"]["text"], low["nodes"]["21"]["text"]
    if preset in ("quality", "balanced"):
        assert high["observed"] == low["observed"] == {"sdpa": 40}
        assert all("nothing to do" in text for text in texts)
    elif preset == "speed":
        assert high["observed"] == low["observed"] == {"sdpa": 4, "host": 36}
    else:
        assert high["observed"] == low["observed"] == {"host": 40}
    assert all((PRESET_TEXTS.get(preset) or "Preset") in text for text in texts) is (preset in PRESET_TEXTS)


def test_a_dense_input_above_the_preset_counts(server):
    make = on_both(lambda p, m, key: switch(p, m, key, preset="speed", dense_first_percent=33.33, dense_last_blocks=1))
    high, _low = server.run(two_stage(make, steps=20, split=10)).runs
    # 7 of the 10 steps lie in the first third; in the others the second block is exact
    assert high["observed"] == {"sdpa": 7 * 4 + 3 * 2, "host": 3 * 2}
    wanted = "Preset speed: percent 0–33.33 and 94–100, the last block stay exact."
    assert wanted in high["nodes"]["20"]["text"]


def test_when_unavailable_error_stops_before_sampling_with_every_reason(server):
    patch = on_both(lambda p, m, key: selector(p, m, key, "sage3", when_unavailable="error"))
    with pytest.raises(PromptFailedError, match="sage3: package sageattn3 is not installed") as caught:
        server.run(two_stage(patch))
    assert caught.value.node_id == "20"


def test_a_cached_node_is_reported_again_and_counts_anew(server):
    workflow = two_stage(on_both(lambda p, m, key: selector(p, m, key, "split")))
    server.run(workflow)
    workflow["12"]["inputs"]["noise_seed"] = workflow["13"]["inputs"]["noise_seed"] = 99
    result = server.run(workflow)
    assert {"20", "21"} <= result.cached
    assert [run["observed"] for run in result.runs] == [{"split": 8}, {"split": 8}]


def test_two_nodes_with_the_same_inputs_are_told_apart(server):
    def patch(prompt, model, stage):
        return selector(prompt, ["1", 0], str(20 + stage), "split", min_tokens=3)

    prompt = two_stage(patch)
    result = server.run(prompt)
    assert [list(run["nodes"]) for run in result.runs] == [["20"], ["21"]]
    renamed = {("40" if key == "20" else key): data for key, data in prompt.items()}
    renamed["10"]["inputs"]["model"] = ["40", 0]
    renamed["12"]["inputs"]["noise_seed"] += 1
    assert "40" in server.run(renamed).runs[0]["nodes"]


def test_a_run_knows_its_workflow_and_two_workflows_are_never_mixed_up(server):
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    workflow = two_stage(on_both(lambda p, m, key: selector(p, m, key, "sdpa")))
    for identity in (first, second):
        workflow["12"]["inputs"]["noise_seed"] += 1
        result = server.run(workflow, workflow_ui={"id": identity, "nodes": []})
        assert {run["workflow_id"] for run in result.runs} == {identity}


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda p, m, k: selector(p, m, k, "sage4"), ["sage4", "sage3_per_block_mean", "basic"]),
        (lambda p, m, k: selector(p, m, k, "auto", cross_attention="turbo"), ["turbo", "sage3_per_block_mean"]),
        (lambda p, m, k: rule(p, m, k, "sage4"), ["sage4", "sage3_per_block_mean"]),
        (lambda p, m, k: rule(p, m, k, "sdpa", blocks="5-2"), ["blocks", "5-2", "runs backwards", "2-37"]),
        (lambda p, m, k: rule(p, m, k, "sdpa", blocks="a-b"), ["blocks", "a-b", "is not a block range"]),
        (lambda p, m, k: rule(p, m, k, "sdpa", from_percent=60.0, to_percent=40.0), ["60", "40", "from_percent"]),
        (lambda p, m, k: rule(p, m, k, "sdpa", from_percent=50.0, to_percent=50.0), ["50", "to_percent"]),
        (lambda p, m, k: rule(p, m, k, "sdpa", to_percent=120.0), ["to_percent", "100"]),
        (lambda p, m, k: rule(p, m, k, "sdpa", from_percent=-5.0), ["from_percent", "0"]),
        (lambda p, m, k: switch(p, m, k, dense_first_percent=120.0), ["dense_first_percent", "100"]),
        (lambda p, m, k: switch(p, m, k, dense_first_percent=60.0, dense_last_percent=40.0), ["nothing to do"]),
        (lambda p, m, k: switch(p, m, k, preset="quality", dense_first_percent=80.0), ["20", "of preset quality"]),
        (lambda p, m, k: switch(p, m, k, preset="best"), ["preset", "best", "custom, quality, balanced, speed"]),
        (lambda p, m, k: switch(p, m, k, preset={}), ["preset", "custom, quality, balanced, speed"]),
        (lambda p, m, k: selector(p, m, k, "auto", cross_attention="disabled"), ["cross_attention", "disabled"]),
        (lambda p, m, k: selector(p, m, k, "auto", error_budget=-0.01), ["error_budget", "0.0"]),
        (lambda p, m, k: selector(p, m, k, "auto", error_budget=1.5), ["error_budget", "1.0"]),
    ],
)
def test_bad_input_is_refused_before_anything_runs(server, make, wanted):
    with pytest.raises(PromptRejectedError) as caught:
        server.run(two_stage(on_both(make)))
    errors = str(caught.value.node_errors.get("20"))
    assert caught.value.status == 400
    assert all(text in errors for text in wanted), errors


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda p, m, k: rule(p, m, k, "sdpa", blocks="1-2"), "blocks: the block range '1-2' goes beyond the model"),
        (lambda p, m, k: switch(p, m, k, dense_last_blocks=3), "dense_last_blocks: this model has 2 blocks"),
    ],
)
def test_blocks_beyond_the_model_name_the_widget_and_the_models_block_count(server, make, wanted):
    with pytest.raises(PromptFailedError, match=wanted) as caught:
        server.run(two_stage(on_both(make)))
    assert "2 blocks" in caught.value.message and caught.value.node_id == "20"


@pytest.mark.parametrize(
    ("class_type", "inputs", "requested"),
    [
        ("Sage3AttentionOnlySwitch", {"enable": True, "print_backend": True}, "sage3"),
        ("Sage3AttentionOnlySwitch", {"enable": False, "print_backend": False}, None),
        ("PathchSageAttentionKJ", {"sage_attention": "disabled"}, None),
        ("PathchSageAttentionKJ", {"sage_attention": False, "allow_compile": True}, None),
        ("PathchSageAttentionKJ", {"sage_attention": "auto"}, "sage"),
        ("PathchSageAttentionKJ", {"sage_attention": "sageattn_qk_int8_pv_fp16_cuda"}, "sage2_fp16_cuda"),
        ("PathchSageAttentionKJ", {"sage_attention": "sageattn_qk_int8_pv_fp16_triton"}, "sage2_fp16_triton"),
        ("PathchSageAttentionKJ", {"sage_attention": "sageattn_qk_int8_pv_fp8_cuda"}, "sage2_fp8_cuda"),
        ("PathchSageAttentionKJ", {"sage_attention": "sageattn_qk_int8_pv_fp8_cuda++"}, "sage2_fp8_cuda_pp"),
        ("PathchSageAttentionKJ", {"sage_attention": "sageattn3"}, "sage3"),
        ("PathchSageAttentionKJ", {"sage_attention": "sageattn3_per_block_mean"}, "sage3_per_block_mean"),
        ("PatchFlashAttentionKJ", {"allow_compile": False}, "flash"),
        ("PatchFlashAttentionKJ", {}, "flash"),
        ("AttentionSelector", {"kernel": "sageattn3", "precision": "exact", "when_unavailable": "fallback",
                               "cross_attention": "same", "min_tokens": 0}, "sage3"),
        ("AttentionSelector", {"kernel": "disabled", "precision": "exact", "when_unavailable": "fallback",
                               "cross_attention": "same", "min_tokens": 0}, None),
    ],
)  # fmt: skip
def test_nodes_of_other_packs_mean_the_same_here(server, clean, class_type, inputs, requested):
    def make(prompt, model, key):
        prompt[key] = node(class_type, model=model, **inputs)
        return [key, 0]

    result = server.run(two_stage(on_both(make)))
    assert {data["requested"] for data in nodes_of(result).values()} == ({requested} if requested else set())
    assert torch.equal(latent(result), clean)


def test_the_server_lists_the_kernels_as_they_are_in_it(server):
    rows = {row["name"]: row for row in server.get("/attune/kernels")["kernels"]}
    assert rows["sub_quad"]["status"] == rows["split"]["status"] == "available"
    assert rows["sage3"]["status"] == "not installed" and rows["sage3"]["reasons"]


def test_swap_nodes_is_offered_with_mappings_that_our_schemas_accept(server):
    offered = server.get("/node_replacements")
    for old, inputs in OLD.items():
        (replacement,) = offered[old]
        assert replacement["old_widget_ids"] == inputs[1:]
        required = server.object_info()[replacement["new_node_id"]]["input"]["required"]
        assert {mapping["new_id"] for mapping in replacement["input_mapping"]} == set(required)


def test_one_model_in_two_samplers_and_twice_patched(server):
    def patch(prompt, model, stage):
        if stage:
            return [["20", 0], selector(prompt, ["20", 0], "21", "basic")][1]
        return selector(prompt, model, "20", "split")

    prompt = two_stage(patch)
    result = server.run(prompt)
    assert [run["observed"] for run in result.runs] == [{"split": 8}, {"basic": 8}]


@pytest.mark.parametrize("pack", ["aa_kj_nodes", "zz_kj_nodes"])
def test_a_node_of_another_pack_is_never_replaced(make_server, pack):
    """Whether that pack is loaded before ours or after it."""
    server = make_server(packs=[ROOT / "tests" / "fixture_packs" / pack])
    try:
        info = server.object_info()
        assert info["PathchSageAttentionKJ"]["category"] == "another pack"
        assert info["PatchFlashAttentionKJ"]["category"] == "attention"
    finally:
        server.stop()


def test_attune_off_makes_the_nodes_pass_models_through(make_server, clean):
    server = make_server(env={"ATTUNE": "off"})
    try:
        strict = on_both(lambda p, m, key: selector(p, m, key, "sage3", when_unavailable="error"))
        result = server.run(two_stage(strict))
        assert result.runs == []
        assert torch.equal(latent(result), clean)
    finally:
        server.stop()
