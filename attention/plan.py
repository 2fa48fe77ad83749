"""From a call and a policy to a kernel: a pure decision that keeps every rejection and its reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .call import AttentionCall
from .kernel import Kernel, machine_reasons, reasons_against
from .machine import Machine, first_choices
from .policy import FAMILIES, Rule

HOST = "host"
AUTO = ("auto", "auto_fast")
DENSE = "is lossy, and a later node asks for exact attention here"
OWN_DENSE = "is lossy, and this node keeps these calls exact"
# The host's own attention functions that are plain PyTorch, by the names of `Machine.host_attention` ("": no host), and
# all that are exact.
PLAIN_HOSTS = frozenset({"", "pytorch", "sub_quad", "split", "basic"})
_EXACT_HOSTS = PLAIN_HOSTS | {"xformers", "flash"}


@dataclass(frozen=True, slots=True)
class Decision:
    """One candidate: the rule's source and wish, the kernel's name, and why it was turned down (empty: accepted)."""

    kernel: str
    requested: str
    source: str
    reasons: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Plan:
    """What `make_plan` decided: the kernel (None: the host's own attention) and the whole trail that led to it."""

    call: AttentionCall
    kernel: Kernel | None
    decisions: tuple[Decision, ...]

    @property
    def name(self) -> str:
        return HOST if self.kernel is None else self.kernel.name


class RefusedError(RuntimeError):
    """A rule that may not fall through cannot be followed; the text holds every candidate with its reasons."""

    def __init__(self, decisions: Sequence[Decision], on_call: AttentionCall | None = None) -> None:
        wanted = " or ".join(dict.fromkeys(decision.requested for decision in decisions))
        lines = [f"  {d.kernel}: {'; '.join(d.reasons)}" for d in decisions]
        where = "" if on_call is None else f" for {on_call.q_len}×{on_call.kv_len} tokens, {on_call.heads} heads"
        text = "\n".join(lines)
        super().__init__(
            f"Attention was asked to run on {wanted} only, and cannot{where}:\n{text}\n"
            "Choose another kernel, or let this node fall back."
        )
        self.decisions = tuple(decisions)


def expand(name: str, machine: Machine, device: str | None = None) -> tuple[str, ...]:
    """The kernels a name stands for, best first: `auto` by the architecture, a family by its members."""
    if name in AUTO:
        if machine.host_flag:  # an explicit launch flag is the user's word and beats an automatic choice
            return (HOST,)
        here = machine.device(device) if device else machine.main_device
        return (*first_choices(here.architecture, fast=name == "auto_fast"), HOST)
    return FAMILIES.get(name, (name,))


def _reasons(
    name: str,
    kernels: Mapping[str, Kernel],
    machine: Machine,
    unfit: Mapping[str, str],
    call: AttentionCall | None,
    device: str | None,
    free_bytes: int | None = None,
) -> tuple[str, ...]:
    if name == HOST:
        return (unfit[HOST],) if HOST in unfit else ()
    if name not in kernels:
        return (f"{name} does not exist in this version or outside ComfyUI",)
    kernel = kernels[name]
    if call is None:
        reasons = machine_reasons(kernel, machine, machine.device(device) if device else None)
    else:
        reasons = reasons_against(kernel, call, machine)
    if reasons:
        return reasons
    if name in unfit:
        return (unfit[name],)
    wanted = 0 if call is None or free_bytes is None else kernel.workspace_bytes(call)
    if free_bytes is not None and wanted > free_bytes:
        return (f"needs {wanted / 2**20:,.0f} MiB of working memory, {free_bytes / 2**20:,.0f} MiB are free",)
    return ()


# (call, rule, wish, the kernels it stands for, those of them that can run the call) → the kernels in the order to take.
Prefer = Callable[[AttentionCall, Rule, str, tuple[str, ...], Sequence[str]], tuple[str, ...]]


def _candidates(
    call: AttentionCall,
    rules: Sequence[Rule],
    machine: Machine,
    order: Callable[[Rule, str, tuple[str, ...]], tuple[str, ...]],
) -> Iterator[tuple[int, str, str, int]]:
    """(index of the rule or -1, wish, kernel name, index of the dense rule above or -1), in the order of asking.

    Matching rules, last first; below a dense rule only exact kernels count, and its own come after the others'.
    """
    dense: list[int] = []
    for index in reversed(range(len(rules))):
        rule = rules[index]
        if not rule.matches(call):
            continue
        if rule.exact_only:
            dense.append(index)
            continue
        for wish in rule.kernels:
            exact = wish == "auto_fast" and not rule.error_budget  # no error is allowed: exact kernels only
            names = expand("auto" if exact else wish, machine, call.device)
            for name in order(rule, wish, names) if wish in AUTO else names:
                # Where `auto` ends, the dense rule's own kernels begin; and the host itself may be lossy.
                if name != HOST or not dense or (wish == HOST and machine.host_attention in _EXACT_HOSTS):
                    yield index, wish, name, dense[0] if dense else -1
    for index in dense:
        for wish in rules[index].kernels:
            yield index, wish, wish, -1
    yield -1, HOST, HOST, -1
    yield -1, "sdpa", "sdpa", -1  # where even the host's own is found wanting


def make_plan(
    call: AttentionCall,
    rules: Sequence[Rule],
    kernels: Mapping[str, Kernel],
    machine: Machine,
    unfit: Mapping[str, str] | None = None,
    free_bytes: int | None = None,
    prefer: Prefer = lambda call, rule, wish, names, runnable: names,
) -> Plan:
    """Choose the kernel for `call` under the `rules` in force, the last matching rule first.

    `kernels` is what this pack knows, by name. `unfit` gives a reason for each kernel that may not be used for this
    call although it claims it (it raised, it was wrong, it is not proved yet), and perhaps for the host; `free_bytes`
    is what may still be allocated; `prefer` puts the kernels of `auto` in order. Raises RefusedError where a rule that
    may not fall through cannot be followed; a rule that only a dense rule keeps from its kernels does not count as
    such. Pure, as far as `prefer` is: the same arguments give the same plan.
    """

    def reasons_of(name: str) -> tuple[str, ...]:
        return _reasons(name, kernels, machine, unfit or {}, call, None, free_bytes)

    def order(rule: Rule, wish: str, names: tuple[str, ...]) -> tuple[str, ...]:
        # Whatever memory is free just now: else a kernel that had no room in one run would open the choice in the next.
        able = [name for name in names if not _reasons(name, kernels, machine, unfit or {}, call, None)]
        return prefer(call, rule, wish, names, able)

    decisions: list[Decision] = []
    of_rule: list[Decision] = []
    current, kept_exact = -1, False
    for index, wish, name, dense in _candidates(call, rules, machine, order):
        if index != current:
            if of_rule and not kept_exact and rules[current].on_refusal == "error":
                raise RefusedError(of_rule, call)
            current, of_rule, kept_exact = index, [], False
        reasons = reasons_of(name)
        if dense >= 0 and name in kernels and not kernels[name].exact:
            kept_exact = True
            reasons += (OWN_DENSE if rules[dense].source == rules[index].source else DENSE,)
        decision = Decision(name, wish, rules[index].source if index >= 0 else "", reasons)
        decisions.append(decision)
        of_rule.append(decision)
        if decision.accepted:
            return Plan(call, kernels.get(name), tuple(decisions))
    return Plan(call, None, (*decisions, Decision(HOST, HOST, "")))


def refused_by_machine(
    wishes: Sequence[str],
    kernels: Mapping[str, Kernel],
    machine: Machine,
    device: str | None = None,
    unfit: Mapping[str, str] | None = None,
) -> tuple[Decision, ...]:
    """The refusals where the machine alone forbids every one of `wishes`; empty where one of them may run.

    `unfit`: as in make_plan.
    """
    decisions: list[Decision] = []
    for wish in wishes:
        for name in expand(wish, machine, device):
            reasons = _reasons(name, kernels, machine, unfit or {}, None, device)
            if not reasons:
                return ()
            decisions.append(Decision(name, wish, "", reasons))
    return tuple(decisions)
