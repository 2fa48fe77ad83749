"""torch.compile: no graph break, no recompilation of our making, and decisions that stay decisions."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

from comfyui_attune.attention.compiled import plain_attention
from comfyui_attune.attention.machine import Machine
from comfyui_attune.attention.policy import Policy, Rule
from comfyui_attune.attention.router import Router
from comfyui_attune.attention.session import Forward, Session
from comfyui_attune.kernels import KERNELS
from support.prompts import latent, node, rule, selector, two_stage
from support.standins import environment

# torch's own compiler uses things that torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:.*torch.jit.*:DeprecationWarning")
BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def model(q, k, v, options, mask=None, scale=0.2):
    """Two attention calls as a host makes them, in both layouts, with arithmetic around them."""
    override = options["optimized_attention_override"]
    x = override(plain_attention, q, k, v, 4, mask=mask, transformer_options=options, scale=scale)
    four = [t.view(t.shape[0], t.shape[1], 4, -1).transpose(1, 2) for t in (x * 2, k, v)]
    y = override(
        plain_attention, *four, heads=4, skip_reshape=True, transformer_options=options, low_precision_attention=False
    )
    return x + y


def why_no_inductor() -> str:
    """Why torch's own inductor cannot compile anything here, or ""."""
    if not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))):
        return "inductor needs a C++ compiler; none is on PATH"
    if " " in sys.prefix:
        return f"torch 2.11's inductor breaks its own linker call at the space in {sys.prefix}"
    return ""


@pytest.fixture
def fresh_dynamo():
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_full_graph_with_rules_that_change_between_calls(fresh_dynamo, backend):
    if backend == "inductor" and (reason := why_no_inductor()):
        pytest.skip(reason)
    router = Router(Policy((Rule(("split",), source="1"), Rule(("sdpa_math",), source="2"))), BY_NAME, Machine())
    q = [torch.randn(2, n, 64) for n in (16, 9, 9)]
    options = {"optimized_attention_override": router, "block_index": 3}
    expected = model(*q, options)
    # As the host compiles: guards on transformer_options are dropped, so the graph is shared between routers.
    compiled = torch.compile(
        model, fullgraph=True, backend=backend, options=None if backend != "inductor" else {"guard_filter_fn": guards}
    )
    for active, name in ((frozenset({0}), "split"), (frozenset({0, 1}), "sdpa_math"), (frozenset({0}), "split")):
        session = Session(router)
        with Forward(router, session, active):
            out = compiled(*q, options)
        assert session.record.observed() == {name: 2}
        assert torch.allclose(out, expected, atol=1e-5)
    other = Router(Policy((Rule(("sdpa_flash",)),)), BY_NAME, Machine())
    session = Session(other)
    with Forward(other, session, frozenset({0})):
        compiled(*q, {**options, "optimized_attention_override": other} if backend == "inductor" else options)
    assert session.record.observed() == {"sdpa_flash": 2}
    assert torch.allclose(compiled(*q, options), expected, atol=1e-5)  # no run in progress: the host's own
    assert fresh_dynamo["stats"]["unique_graphs"] == 1
    assert not fresh_dynamo["graph_break"]


def guards(entries):
    return ["options" not in entry.name for entry in entries]


def test_masks_and_grouped_queries_in_a_graph(fresh_dynamo):
    router = Router(Policy((Rule(("split",)),)), BY_NAME, Machine())

    def attend(q, k, v, mask):
        return router(plain_attention, q, k, v, 4, mask=mask, skip_reshape=True, enable_gqa=True)

    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    mask = torch.rand(8, 5) < 0.7
    mask[:, 0] = True
    session = Session(router)
    with Forward(router, session, frozenset({0})):
        out = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v, mask)
    assert session.record.observed() == {"split": 1}
    expected = plain_attention(q, k, v, 4, mask, skip_reshape=True, enable_gqa=True)
    assert torch.allclose(out, expected, atol=1e-5)


def test_a_function_of_another_pack_is_never_replaced_in_a_graph(fresh_dynamo):
    def plain_attention(q, k, v, heads, *rest, **kwargs):  # even with a name that the operator knows
        return q * 3

    router = Router(Policy((Rule(("split",)),)), BY_NAME, Machine())
    q = torch.randn(1, 4, 16)
    compiled = torch.compile(lambda q: router(plain_attention, q, q, q, 2) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q), q * 3 + 1)


def test_bare_calls_keep_out_of_the_way_of_a_later_override(fresh_dynamo):
    from comfyui_attune.attention.compiled import traced_attention

    router = Router(Policy((Rule(("split",)),)), BY_NAME, Machine())
    q = torch.randn(1, 4, 16)
    compiled = torch.compile(lambda q: traced_attention(plain_attention, q, q, q, 2, bare=True), backend="eager")
    for takes, observed in ((False, {}), (True, {"split": 1})):
        session = Session(router)
        with Forward(router, session, frozenset({0}), takes_bare_calls=takes):
            compiled(q)
        assert session.record.observed() == observed


def test_the_operator_stays_out_of_cuda_graphs():
    from comfyui_attune.attention import compiled

    if hasattr(torch.Tag, "cudagraph_unsafe"):
        assert torch.Tag.cudagraph_unsafe in compiled._OPERATOR.tags


def test_the_operator_keeps_its_promises():
    from comfyui_attune.attention import compiled

    q = torch.randn(2, 6, 32)
    for skip_output in (False, True):
        arguments = (
            q,
            q.clone(),
            q.clone(),
            None,
            4,
            False,
            skip_output,
            False,
            None,
            False,
            True,
            "plain_attention",
            -1,
            "",
            -1,
            False,
        )
        torch.library.opcheck(compiled._OPERATOR, arguments)


@pytest.fixture(scope="module")
def compiling_server(make_server, tmp_path_factory):
    if reason := why_no_inductor():
        pytest.skip(reason)
    broken = environment(tmp_path_factory.mktemp("home"), "sage2", fault="sage2_fp8_cuda:nan:from=10")
    env = {**broken, "TORCH_LOGS": "recompiles,graph_breaks"}
    server = make_server("--use-pytorch-cross-attention", env=env)
    yield server
    server.stop()


def compiled_prompt(patch, seed=5):
    """The two-stage prompt with TorchCompileModel behind the pack's nodes, on the first stage only."""

    def with_compile(prompt, link, stage):
        if stage:
            return link
        link = patch(prompt, link) if patch else link
        prompt["50"] = node("TorchCompileModel", model=link, backend="inductor")
        return ["50", 0]

    prompt = two_stage(with_compile, steps=8, split=6)
    prompt["12"]["inputs"]["noise_seed"] = seed
    return prompt


def test_a_compiled_model_in_comfyui_obeys_new_settings_percents_and_bypass(compiling_server):
    """One model, compiled before the nodes were there; then settings change under it, then the nodes go."""
    server = compiling_server
    before = latent(server.run(compiled_prompt(None), seconds=400))

    result = server.run(compiled_prompt(lambda p, m: selector(p, m, "20", "split")), seconds=400)
    assert result.runs[0]["observed"] == {"split": 24}
    assert torch.allclose(latent(result), before, atol=1e-3)
    log_from = len(server.output())

    result = server.run(compiled_prompt(lambda p, m: selector(p, m, "20", "sdpa_math")), seconds=400)
    assert result.runs[0]["observed"] == {"sdpa_math": 24}

    def schedule(prompt, link):
        return rule(prompt, selector(prompt, link, "20", "sdpa_flash"), "30", "split", to_percent=30.0)

    result = server.run(compiled_prompt(schedule), seconds=400)
    assert result.runs[0]["observed"] == {"split": 12, "sdpa_flash": 12}

    result = server.run(compiled_prompt(lambda p, m: selector(p, m, "20", "host")), seconds=400)
    assert result.runs[0]["observed"] == {"host": 24}
    exact = latent(result)

    # A kernel that gives NaN from the third forward on: healed, without compiling anything again.
    result = server.run(compiled_prompt(lambda p, m: selector(p, m, "20", "sage2_fp8_cuda")), seconds=400)
    assert result.runs[0]["observed"] == {"sage2_fp8_cuda": 8, "host": 16}
    assert result.runs[0]["repeated"] == 1
    assert torch.allclose(latent(result), exact, atol=2e-2)  # the stand-in rounds to float16
    log = server.output()[log_from:]
    assert "Recompiling" not in log, log
    assert "Graph break" not in server.output()

    result = server.run(compiled_prompt(None, seed=5), seconds=400)
    assert result.runs == []
    assert torch.equal(latent(result), before)
