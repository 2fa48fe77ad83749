"""Routing on a GPU: right at the sizes of a real model, and never waiting for the device."""

from __future__ import annotations

import pytest
import torch

from comfyui_attune.attention.compiled import plain_attention
from comfyui_attune.attention.errors import make_inputs, measure_errors
from comfyui_attune.attention.kernel import machine_reasons
from comfyui_attune.attention.machine import read_machine
from comfyui_attune.attention.policy import Policy, Rule
from comfyui_attune.attention.router import Router
from comfyui_attune.attention.session import Forward, Session
from comfyui_attune.kernels import KERNELS

BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def wan_call(tokens: int) -> list[torch.Tensor]:
    q, k, v = make_inputs(1, 40, tokens, tokens, 128, dtype=torch.bfloat16, device="cuda")
    return [t.transpose(1, 2).flatten(2) for t in (q, k, v)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [kernel.name for kernel in KERNELS if kernel.exact])
def test_a_call_of_the_size_of_wan_is_right_and_waits_for_nothing(name):
    machine = read_machine()
    if reasons := machine_reasons(BY_NAME[name], machine):
        pytest.skip(f"{name} cannot run on this machine: {'; '.join(reasons)}")
    router = Router(Policy((Rule((name,)),)), BY_NAME, machine)
    q = wan_call(4096)
    session = Session(router)
    with Forward(router, session, frozenset({0})):
        out = router(plain_attention, *q, 40)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            router(plain_attention, *q, 40)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert session.record.observed() == {name: 2}
    expected = plain_attention(*[t.float() for t in q], 40)
    assert measure_errors(out, expected).l2 <= BY_NAME[name].tolerance[torch.bfloat16]
