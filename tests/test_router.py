"""The router: fall-back, demotion, memory, threads, containers, other packs' overrides."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch

from comfyui_attune.attention import routing
from comfyui_attune.attention.call import Layout
from comfyui_attune.attention.chained import ChainedRouter
from comfyui_attune.attention.compiled import plain_attention
from comfyui_attune.attention.kernel import Kernel, Needs
from comfyui_attune.attention.link import HostLink
from comfyui_attune.attention.machine import Machine
from comfyui_attune.attention.plan import RefusedError
from comfyui_attune.attention.policy import BlockRange, Policy, Rule
from comfyui_attune.attention.reference import reference_attention
from comfyui_attune.attention.router import Router
from comfyui_attune.attention.session import BUSY, CURRENT, Forward, Session

EVERYTHING = Needs(
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
    masks=frozenset({"bool", "float"}),
    gqa=True,
    other_v_dim=True,
)


class Fake:
    """A kernel that computes the reference, counts its calls, and raises `error` where one is set."""

    def __init__(self, name: str, layout: Layout = Layout.BHND, error: Exception | None = None, **needs: object):
        self.calls = 0
        self.seen: list[torch.Tensor] = []
        self.error = error
        self.kernel = Kernel(
            name=name,
            title=name,
            package="",
            layout=layout,
            precision="exact",
            tolerance={torch.float32: 1e-5},
            load=lambda: self.run,
            needs=Needs(**{**{f: getattr(EVERYTHING, f) for f in EVERYTHING.__slots__}, **needs}),
        )

    def run(self, q, k, v, *, mask=None, scale=None):
        self.calls += 1
        self.seen = [q, k, v]
        if self.error is not None:
            raise self.error
        swap = self.kernel.layout is Layout.BNHD
        q, k, v = (t.transpose(1, 2) if swap else t for t in (q, k, v))
        out = reference_attention(q, k, v, mask=mask, scale=scale).to(q.dtype)
        return out.transpose(1, 2) if swap else out


def make(*fakes: Fake, rules=None, link=None, earlier=None) -> Router:
    kernels = {fake.kernel.name: fake.kernel for fake in fakes}
    rules = rules or [Rule(tuple(kernels), source="7")]
    arguments = (Policy(tuple(rules)), kernels, Machine(), link or HostLink())
    return Router(*arguments) if earlier is None else ChainedRouter(earlier, *arguments)


def tensors(n=16, heads=2, dim=32, batch=1):
    torch.manual_seed(0)
    return [torch.randn(batch, n, heads * dim) for _ in range(3)]


class Host:
    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return plain_attention(*args, **kwargs)

    __name__ = "host"


@pytest.fixture
def run():
    """run(router, *args, **kwargs): one call inside a session of its own; returns (output, session)."""

    def one(router, *args, host=None, session=None, **kwargs):
        session = session or Session(router)
        with Forward(router, session, router.policy.without_percent):
            return router(host or Host(), *args, **kwargs), session

    return one


def test_a_kernel_that_raises_costs_one_log_line_and_nothing_else(run, caplog):
    bad, good = Fake("sdpa_flash", error=RuntimeError("no kernel image")), Fake("sdpa_math")
    router, q = make(bad, good), tensors()
    with caplog.at_level(logging.INFO, logger="attune"):
        out, session = run(router, *q, 2)
        run(router, *q, 2, session=session)
    assert torch.allclose(out, plain_attention(*q, 2), atol=1e-5)
    assert (bad.calls, good.calls) == (1, 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "sdpa_flash raised RuntimeError: no kernel image" in caplog.text
    node = session.record.nodes()["7"]
    assert node.observed == {"sdpa_math": 2}
    assert node.refused == {("sdpa_flash", ("raised RuntimeError: no kernel image",)): 2}


def test_when_every_kernel_raises_the_host_gets_the_untouched_arguments(run):
    bad, host, (q, k, v) = Fake("sdpa", error=ValueError("no")), Host(), tensors()
    mask = torch.ones(16, 16, dtype=torch.bool)
    options = {"block_index": 1}
    out, _ = run(
        make(bad), q, k, v, heads=2, mask=mask, transformer_options=options, _inside_attn_wrapper=True, host=host
    )
    args, kwargs = host.calls[0]
    assert args[0] is q and args[1] is k and args[2] is v and args[4] is mask
    assert kwargs["transformer_options"] is options and "scale" not in kwargs and "enable_gqa" not in kwargs
    assert torch.equal(out, plain_attention(q, k, v, 2, mask))


def test_a_kernel_that_cannot_be_loaded_is_passed_over(run):
    def load():
        raise ImportError("undefined symbol: _ZN3c10")

    broken = Fake("flash2")
    broken.kernel = Kernel(**{**{f: getattr(broken.kernel, f) for f in Kernel.__slots__}, "load": load})
    good = Fake("sdpa")
    _, session = run(make(broken, good), *tensors(), 2)
    assert session.record.observed() == {"sdpa": 1}
    assert "undefined symbol" in session.record.notes[0]


class Interrupt(Exception):
    pass


def test_an_interrupt_is_never_swallowed(run):
    bad, host = Fake("sdpa", error=Interrupt()), Host()
    with pytest.raises(Interrupt):
        run(make(bad, link=HostLink(interrupts=(Interrupt,))), *tensors(), 2, host=host)
    assert not host.calls
    assert CURRENT.get() is None


def test_keyboard_interrupt_goes_through(run):
    bad = Fake("sdpa")
    bad.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(make(bad), *tensors(), 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError("no")])
def test_out_of_memory_frees_and_tries_the_least_hungry_exact_kernel_once(run, error):
    freed = []
    hungry, split, other = Fake("sdpa", error=error), Fake("split"), Fake("sdpa_math")
    router = make(hungry, other, split, link=HostLink(free_memory=lambda: freed.append(1)), rules=[Rule(("sdpa",))])
    _, session = run(router, *tensors(), 2)
    run(router, *tensors(), 2, session=session)
    assert freed == [1]
    assert (hungry.calls, split.calls, other.calls) == (1, 2, 0)
    assert session.record.observed() == {"split": 2}


def test_out_of_memory_is_raised_when_the_least_hungry_kernel_fails_too(run):
    oom = torch.OutOfMemoryError("CUDA out of memory")
    host = Host()
    with pytest.raises(torch.OutOfMemoryError):
        run(make(Fake("sdpa", error=oom), Fake("split", error=oom), rules=[Rule(("sdpa",))]), *tensors(), 2, host=host)
    assert not host.calls


def test_a_failure_holds_for_one_run_only(run):
    flaky = Fake("sdpa", error=RuntimeError("once"))
    router = make(flaky)
    run(router, *tensors(), 2)
    flaky.error = None
    _, session = run(router, *tensors(), 2)
    assert session.record.observed() == {"sdpa": 1}


def test_no_call_copies_a_tensor_that_can_be_read_as_a_view(run):
    for layout in Layout:
        for skip in (False, True):
            fake, q = Fake("sdpa", layout=layout), tensors()
            if skip:
                q = [t.view(1, 16, 2, 32).transpose(1, 2) for t in q]
            run(make(fake), *q, 2, skip_reshape=skip)
            for given, seen in zip(q, fake.seen, strict=True):
                assert seen.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def test_an_unknown_argument_is_a_reason_to_refuse_every_kernel(run):
    fake, host = Fake("sdpa"), Host()
    _, session = run(make(fake), *tensors(), 2, host=host, sliding_window=8)
    assert fake.calls == 0
    assert host.calls[0][1]["sliding_window"] == 8
    reasons = session.record.nodes()["7"].refused
    assert "sliding_window" in next(iter(reasons))[1][0]


def test_shapes_that_do_not_fit_are_left_to_the_host(run):
    fake, host = Fake("sdpa"), Host()
    q, k, v = tensors()
    mask = torch.zeros(5, 7, 16)
    with pytest.raises(RuntimeError):  # the host's own error, not one of ours
        run(make(fake), q, k, v, 2, mask=mask, host=host)
    assert len(host.calls) == 1


def test_low_precision_false_forbids_lossy_kernels(run):
    lossy, exact = Fake("sage1"), Fake("sdpa")
    lossy.kernel = Kernel(**{**{f: getattr(lossy.kernel, f) for f in Kernel.__slots__}, "precision": "lossy"})
    router = make(lossy, exact)
    run(router, *tensors(), 2, low_precision_attention=False)
    assert (lossy.calls, exact.calls) == (0, 1)
    run(router, *tensors(), 2, low_precision_attention=True)
    assert lossy.calls == 1


def test_float32_scores_asked_for_by_the_model_refuse_kernels_without_them(run):
    narrow, wide = Fake("sage1", fp32_scores=False), Fake("sdpa")
    q = [t.half() for t in tensors()]
    run(make(narrow, wide), *q, 2, attn_precision=torch.float32)
    assert (narrow.calls, wide.calls) == (0, 1)


def test_batch_times_heads_above_65535(run):
    fake = Fake("sdpa")
    q = [torch.randn(70_000, 2, 8) for _ in range(3)]
    out, _ = run(make(fake), *q, 1)
    assert torch.allclose(out, plain_attention(*q, 1), atol=1e-5)


def test_containers_are_taken_and_emptied(run):
    class Container:  # as the host's AttentionTensorContainer from 0.33 on
        def __init__(self, tensor):
            self._tensor = tensor

        def peek(self):
            if self._tensor is None:
                raise RuntimeError("container has been consumed")
            return self._tensor

        def take(self):
            tensor, self._tensor = self.peek(), None
            return tensor

    q = tensors()
    held = [Container(t) for t in q]
    fake = Fake("sdpa", error=RuntimeError("fails after the containers are empty"))
    out, _ = run(make(fake), *held, 2)
    assert torch.allclose(out, plain_attention(*q, 2), atol=1e-5)
    for container in held:
        with pytest.raises(RuntimeError):
            container.peek()


def test_the_host_of_0_33_hands_over_its_function_because_there_is_no_container_function():
    # `wrap_attn` there calls override.container_function (without func) as soon as the attribute exists.
    assert not hasattr(make(Fake("sdpa")), "container_function")


def test_an_earlier_override_keeps_its_meaning_and_gets_the_routed_kernel(run):
    def doubling(func, q, k, v, heads, **kwargs):
        return 2 * func(q, k, v, heads, **kwargs)

    fake, q = Fake("sdpa"), tensors()
    out, session = run(make(fake, earlier=doubling), *q, 2)
    assert torch.allclose(out, 2 * plain_attention(*q, 2), atol=1e-5)
    assert fake.calls == 1 and session.record.shadowed == 0


def test_an_earlier_override_that_never_asks_is_counted(run):
    fake, q = Fake("sdpa"), tensors()
    out, session = run(make(fake, earlier=lambda func, q, *rest, **kw: q * 0), *q, 2)
    assert float(out.abs().max()) == 0
    assert fake.calls == 0 and session.record.shadowed == 1


def test_a_call_inside_the_host_is_the_hosts_own_business(run):
    router = make(Fake("sdpa", error=ValueError("no")))
    seen = []

    def host(*args, **kwargs):
        seen.append(CURRENT.get())
        return plain_attention(*args, **kwargs)

    run(router, *tensors(), 2, host=host)
    assert seen == [BUSY]


def test_threads_are_kept_apart_and_all_calls_are_counted():
    fake = Fake("sdpa")
    router = make(fake)
    session = Session(router)
    failures = []

    def work(seed: int) -> None:
        torch.manual_seed(seed)
        q = [torch.randn(1, 8 + seed, 64) for _ in range(3)]
        expected = plain_attention(*q, 2)
        for _ in range(20):
            with Forward(router, session, frozenset({0})):
                for _ in range(5):
                    if not torch.allclose(router(Host(), *q, 2), expected, atol=1e-5):
                        failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert session.record.observed() == {"sdpa": 6 * 20 * 5}
    assert session.record.forwards == 6 * 20
    assert CURRENT.get() is None


def test_a_rule_that_may_not_fall_through_raises_with_all_reasons(run):
    fake = Fake("sdpa_flash", masks=frozenset(), head_dims=frozenset({64}))
    router = make(fake, Fake("sdpa"), rules=[Rule(("sdpa",)), Rule(("sdpa_flash",), on_refusal="error")])
    with pytest.raises(RefusedError) as caught:
        run(router, *tensors(), 2, mask=torch.ones(16, 16, dtype=torch.bool))
    assert "head dimension of 64, this is 32" in str(caught.value) and "takes no mask" in str(caught.value)


def test_blocks_of_two_kinds_are_numbered_through(run):
    fake = Fake("sdpa")
    kernels = {"sdpa": fake.kernel}
    router = Router(Policy((Rule(("sdpa",), blocks=BlockRange(19, 19)),)), kernels, Machine(), doubles=19, blocks=57)
    for options, calls in (
        ({"block_index": 0, "block_type": "double"}, 0),
        ({"block_index": 0, "block_type": "single"}, 1),
        ({"block_index": 18, "block_type": "double"}, 1),
        ({"transformer_index": 19, "block_index": 0}, 2),
        ({}, 2),
    ):
        run(router, *tensors(), 2, transformer_options=options)
        assert fake.calls == calls, options


def test_a_deep_copy_of_model_options_keeps_the_router():
    router = make(Fake("sdpa"))
    assert copy.deepcopy({"a": [router]})["a"][0] is router


def test_workspace_that_does_not_fit_is_refused_with_both_figures(run):
    fake = Fake("sdpa_math")
    fields = {f: getattr(fake.kernel, f) for f in Kernel.__slots__}
    fake.kernel = Kernel(**{**fields, "workspace_bytes": lambda call: 3 * 2**20})
    router = make(fake, link=HostLink(free_bytes=lambda device: 2**20))
    _, session = run(router, *tensors(), 2)
    assert session.record.observed() == {"host": 1}
    ((_, reasons),) = session.record.nodes()["7"].refused
    assert reasons == ("needs 3 MiB of working memory, 1 MiB are free",)


def test_a_kernel_that_fails_in_one_block_is_not_tried_in_the_others(run, caplog):
    bad, good = Fake("sdpa_flash", error=RuntimeError("CUDA error")), Fake("sdpa")
    router = make(bad, good)
    session = Session(router)
    for block in range(5):
        bad.error = RuntimeError(f"CUDA error {block}")
        run(router, *tensors(), 2, session=session, transformer_options={"block_index": block})
    assert (bad.calls, good.calls) == (1, 5)
    assert len(caplog.records) == 1 and len(session.record.notes) == 1


def test_what_a_failed_kernel_held_is_given_back_before_memory_is_freed(run):
    import weakref

    held = []

    def hungry(q, k, v, *, mask=None, scale=None):
        scratch = torch.empty(1000)
        held.append(weakref.ref(scratch))
        raise torch.OutOfMemoryError("out of memory")

    alive = []
    fake, split = Fake("sdpa"), Fake("split")
    fake.run = hungry
    link = HostLink(free_memory=lambda: alive.append(held[0]() is not None))
    run(make(fake, split, link=link, rules=[Rule(("sdpa",))]), *tensors(), 2)
    assert alive == [False]


def test_a_call_that_wants_gradients_is_the_hosts(run):
    fake, q = Fake("sdpa"), tensors()
    q[0].requires_grad_(True)
    out, session = run(make(fake), *q, 2)
    out.sum().backward()
    assert fake.calls == 0 and q[0].grad is not None
    ((_, reasons),) = session.record.nodes()["7"].refused
    assert "gradients" in reasons[0]


def test_something_that_is_no_tensor_is_the_hosts_business(run):
    host = Host()
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
        run(make(Fake("sdpa")), tensors()[0], None, None, 2, host=host)
    assert len(host.calls) == 1


def test_a_strict_rule_also_holds_for_calls_that_nobody_can_describe(run):
    q, k, v = tensors()
    router = make(Fake("sdpa"), rules=[Rule(("sdpa",), on_refusal="error")])
    with pytest.raises(RefusedError, match="does not broadcast"):
        run(router, q, k, v, 2, mask=torch.zeros(5, 7, 16))


def test_a_block_range_on_a_model_that_does_not_number_its_blocks_is_said(run):
    fake = Fake("sdpa")
    router = make(fake, rules=[Rule(("sdpa",), blocks=BlockRange(0, 3))])
    _, session = run(router, *tensors(), 2)
    assert fake.calls == 0
    assert "does not tell the number of its blocks" in session.record.notes[0]


def test_an_earlier_override_that_calls_the_host_by_itself_is_not_routed(run):
    seen = []

    def own_way(func, *args, **kwargs):
        seen.append(CURRENT.get())
        return plain_attention(*args, **kwargs)

    fake = Fake("sdpa")
    run(make(fake, earlier=own_way), *tensors(), 2)
    assert seen == [BUSY] and fake.calls == 0


def test_a_tensor_as_scale_is_never_kept(run):
    fake, host, router = Fake("sdpa"), Host(), make(Fake("sdpa"))
    session = Session(router)
    run(router, *tensors(), 2, scale=torch.tensor(0.5), host=host, session=session)
    assert fake.calls == 0 and len(host.calls) == 1
    assert not session.routes(frozenset({0}))


def test_calls_outside_any_run_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(routing, "_MOST_ROUTES", 10)
    router = make(Fake("sdpa"))
    for n in range(1, 50):
        router(Host(), *[torch.randn(1, n, 16)] * 3, 2)
        assert len(router._idle.routes) <= 10 and len(router._idle.counts) <= 10
    router.flush_idle()
    assert router.idle_session.record.observed() == {"sdpa": 49}


def test_after_memory_ran_out_a_split_that_fails_as_well_ends_at_the_host(run):
    """What fails after a failed allocation is often something else, an allocation of a library."""
    hungry = Fake("flash2", error=torch.OutOfMemoryError("CUDA out of memory"))
    split = Fake("split", error=RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))
    host = Host()
    run(make(hungry, split, rules=[Rule(("flash2",))]), *tensors(), 2, host=host)
    assert (hungry.calls, split.calls, len(host.calls)) == (1, 1, 1)


def test_a_split_that_the_doctor_condemned_is_not_called_even_then(run):
    hungry, split, host = Fake("flash2", error=torch.OutOfMemoryError("CUDA out of memory")), Fake("split"), Host()
    link = HostLink(refused=lambda _device: {"split": "the doctor found: wrong numbers"})
    run(make(hungry, split, rules=[Rule(("flash2",))], link=link), *tensors(), 2, host=host)
    assert (split.calls, len(host.calls)) == (0, 1)
