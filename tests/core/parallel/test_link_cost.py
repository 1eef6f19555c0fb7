"""The warning about tensor parallel between hosts: who, how fast, what a token waits."""

from __future__ import annotations

from dataclasses import replace

from aphro_core.messages.steps import LinkCost, WorkerLoaded
from aphro_core.models.registry import load_spec
from aphro_core.parallel.link_cost import tensor_link_warning
from aphro_core.parallel.shard import build_plan
from tests.tiny import tiny_model


def loaded(rank: int, host: str, link: LinkCost | None) -> WorkerLoaded:
    return WorkerLoaded(rank, 1, host, "cpu", 0, 0, 0, 0, 0, 0, link=link)


def test_what_a_token_waits() -> None:
    spec = replace(
        load_spec({**tiny_model("llama").config.to_dict(), "architectures": ["LlamaForCausalLM"]}), num_layers=5
    )
    plan = build_plan(spec, 2, 2, [3, 2])
    ranks = [
        loaded(0, "a", LinkCost(0.001, 2e8)),
        loaded(1, "b", LinkCost(0.002, 1e8)),
        loaded(2, "c", LinkCost(0.5, 1e6)),  # of a stage that has a host to itself
        loaded(3, "c", LinkCost(0.5, 1e6)),
    ]
    found = tensor_link_warning(plan, ranks)
    assert "spans a, b, which exchange 100 MB/s: each token waits 12.0 ms for 6 sums" in found
    assert "(2,000 us each, measured now)" in found
    assert tensor_link_warning(plan, [replace_host(each, "one") for each in ranks]) == ""
    assert tensor_link_warning(plan, [loaded(rank, host, None) for rank, host in enumerate("abcd")]) == ""


def replace_host(each: WorkerLoaded, host: str) -> WorkerLoaded:
    return loaded(each.rank, host, each.link)
