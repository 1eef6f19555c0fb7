"""All ways to spread a model over devices: which are legal and why not, what each holds, and which to take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from aphro_core.errors import PlacementError
from aphro_core.estimate.estimate import Estimate, estimate
from aphro_core.estimate.question import Question


@dataclass(frozen=True)
class Plan:
    """One (tp, pp). ``found`` None: illegal, for ``reason``."""

    tp: int
    pp: int
    reason: str
    found: Estimate | None = None
    recommended: bool = False

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp


def plan_all(question: Question) -> list[Plan]:
    """Every (tp, pp) up to ``max_devices``, fewest devices first, the recommended one marked.

    Recommended: on one host the fewest devices that hold what was asked, with tensor parallel as wide as it goes; where
    one host is not enough, the fewest hosts with tensor parallel inside each and stages across.
    """
    plans = [
        plan_one(question, tp, devices // tp)
        for devices in range(1, question.max_devices + 1)
        for tp in range(1, devices + 1)
        if devices % tp == 0
    ]
    best = recommend(plans, question.devices_per_host)
    return [replace(plan, recommended=True, reason=_why(plan, question)) if plan is best else plan for plan in plans]


def plan_one(question: Question, tp: int, pp: int) -> Plan:
    try:
        found = estimate(question, tp, pp)
    except PlacementError as error:
        return Plan(tp, pp, error.message)
    return Plan(tp, pp, _note(found, question), found)


def recommend(plans: list[Plan], devices_per_host: int) -> Plan | None:
    """None when nothing fits. A plan that surely fits is preferred to one that may not start."""
    for verdicts in (("fits",), ("fits", "may_not_start")):
        good = [plan for plan in plans if plan.found is not None and plan.found.verdict in verdicts]
        if good:
            return min(good, key=lambda plan: _preference(plan, devices_per_host))
    return None


def _preference(plan: Plan, devices_per_host: int) -> tuple[int, int, int, int]:
    """Least is best: on one host the fewest devices; else the fewest hosts, whole ones, as wide as tp gets inside."""
    if plan.tp > devices_per_host:
        return 10**6, 0, plan.tp, plan.num_devices  # every layer waits for the network
    num_hosts = ceil(plan.pp / (devices_per_host // plan.tp))
    return num_hosts, plan.num_devices if num_hosts == 1 else 0, -plan.tp, plan.num_devices


def _why(plan: Plan, question: Question) -> str:
    found = plan.found
    assert found is not None
    if plan.num_devices == 1:
        why = "fits one device: no communication"
    elif plan.tp > question.devices_per_host:
        why = "nothing smaller holds it, though tensor parallel crosses hosts"
    elif plan.num_devices > question.devices_per_host:
        why = f"the fewest hosts that hold it: tensor parallel {plan.tp} inside each, {plan.pp} stages across"
    elif plan.pp == 1:
        why = f"the fewest devices that hold it: {plan.tp} of one host share each layer"
    else:
        why = f"the fewest devices that hold it: {plan.pp} stages (tensor parallel {plan.num_devices} does not)"
    if found.verdict == "may_not_start":
        why += "; within the estimate's doubt"
    note = _shares(found)
    return f"{why}; {note}" if note else why


def _note(found: Estimate, question: Question) -> str:
    """Beside the figures of a legal plan: whether it fits, is uneven, or crosses hosts."""
    notes = []
    if found.verdict == "does_not_fit":
        notes.append(shortage(found))
    elif found.verdict == "may_not_start":
        notes.append("may not start: within the estimate's doubt")
    shares = _shares(found)
    if shares:
        notes.append(shares)
    if found.sizes.tp > question.devices_per_host:
        notes.append("tensor parallel across hosts: two all-reduces a layer over the network")
    return "; ".join(notes) or "fits"


def shortage(found: Estimate) -> str:
    """By how much, and on which rank, a plan does not fit."""
    rank = found.short_rank
    missing = found.missing_bytes
    if missing <= 0:
        return "sized, then out of memory: graphs and the sampler's first call come on top of the budget"
    where = f"rank {rank.rank}" if found.sizes.tp * found.sizes.pp > 1 else "the device"
    over = "weights and activations alone are too large" if rank.left_bytes <= 0 else "no room for one such request"
    doubt = found.doubt_bytes(rank)
    hope = f"; within the estimate's +-{doubt / 2**30:.2f} GiB, it may start" if missing < doubt else ""
    return f"does not fit: {missing / 2**30:.2f} GiB short on {where} ({over}){hope}"


def closeness(found: Estimate) -> str:
    """Why a plan that fits may not start."""
    rank = found.short_rank
    if found.after_sizing == "may_die":
        return "may not start: graphs and the sampler's first call come on top of the budget, and leave next to nothing"
    spare, doubt = -found.missing_bytes / 2**30, found.doubt_bytes(rank) / 2**30
    where = f"rank {rank.rank}" if found.sizes.tp * found.sizes.pp > 1 else "the device"
    return f"may not start: {spare:.2f} GiB more than it needs on {where}, within the estimate's +-{doubt:.2f} GiB"


def _shares(found: Estimate) -> str:
    """``uneven: 3+3+2 KV heads`` where tp ranks hold different shares, and copies where KV heads are copied."""
    first = [balance for balance in found.ranks if balance.stage == 0]
    heads = [balance.num_kv_heads for balance in first]
    queries = [balance.num_heads for balance in first]
    if len(set(heads)) > 1:
        return f"uneven: {'+'.join(map(str, heads))} KV heads, the largest share decides"
    if len(set(queries)) > 1:
        return f"uneven: {'+'.join(map(str, queries))} query heads, KV heads copied"
    if sum(heads) > found.question.source.facts.num_kv_heads and not found.question.source.facts.has_latent:
        return "KV heads copied: more ranks do not hold more tokens"
    return ""
