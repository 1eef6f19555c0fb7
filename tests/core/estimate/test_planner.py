"""Plans: the three cases that the project was made from, uneven and illegal sizes, and remedies that hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aphro_core.estimate.estimate import estimate
from aphro_core.estimate.planner import Plan, plan_all, plan_one, shortage
from aphro_core.estimate.question import Question
from aphro_core.estimate.remedies import remedies
from aphro_core.models.quantization import QuantSpec
from aphro_core.parallel import memory
from tests.core.estimate.asking import ask, question
from tests.core.estimate.configs import GPT_OSS_20B, LLAMA_8B, MIXTRAL, QWEN_30B_A3B, QWEN_32B, QWEN_72B


def recommended(asked: Question) -> Plan:
    (best,) = [plan for plan in plan_all(asked) if plan.recommended]
    return best


def asked_of(config: dict[str, Any], gpu: str, max_devices: int, per_host: int, **changes: Any) -> Question:
    return question(config, gpu=gpu, engine="aphro", max_devices=max_devices, devices_per_host=per_host,
                    max_model_len=8192, **changes)  # fmt: skip


def test_one_gpu_if_it_fits() -> None:
    best = recommended(asked_of(LLAMA_8B, "H100", 8, 8))
    assert (best.tp, best.pp) == (1, 1)
    assert "no communication" in best.reason


def test_tensor_parallel_inside_a_host() -> None:
    best = recommended(asked_of(QWEN_72B, "A100-80GB", 8, 8))
    assert best.pp == 1
    assert best.tp > 1
    assert "of one host" in best.reason


def test_stages_across_hosts() -> None:
    best = recommended(asked_of(QWEN_72B, "4090", 16, 4))
    assert (best.tp, best.pp) == (4, 3)
    assert "across" in best.reason
    wide = next(plan for plan in plan_all(asked_of(QWEN_72B, "4090", 16, 4)) if plan.tp == 8)
    assert "over the network" in wide.reason


def test_ranks_on_several_hosts_have_no_buffers_of_peers() -> None:
    """Their sums and logits go by NCCL (distributed.py)."""
    near, far = (estimate(asked_of(QWEN_72B, "4090", 16, per_host), 8, 1) for per_host in (8, 4))
    buffers = memory.peer_bytes(8192, 8, near.sizes.max_num_batched_tokens, 2)
    buffers += memory.peer_logits_bytes(QWEN_72B["vocab_size"], 8, near.sizes.max_num_seqs, 2)
    assert near.ranks[0].overhead_bytes - far.ranks[0].overhead_bytes == buffers > 0


@pytest.mark.parametrize("has_spec", [True, False])
@pytest.mark.parametrize(
    ("slots", "near"),
    [((2, 1, 3), [True, True, False]), ((1, 2, 4), [True, True, True]), ((6,), [True] * 3), ((1,) * 6, [False] * 3)],
)
def test_hosts_of_a_cluster_decide_whose_sums_go_by_peer_memory(
    slots: tuple[int, ...], near: list[bool], has_spec: bool
) -> None:
    """Stage by stage, where ranks are placed: the smallest node says nothing of the others."""
    question = asked_of(LLAMA_8B, "H100", 6, 1)
    question = replace(question, device=replace(question.device, slots=slots))
    if not has_spec:
        question = replace(question, source=replace(question.source, spec=None))
    overheads = [rank.overhead_bytes for rank in estimate(question, 2, 3).ranks]
    outside = memory.outside_bytes(2, 3)
    assert [size > outside for size in overheads[::2]] == [size > outside for size in overheads[1::2]] == near


def shared_head_of(asked: Question, tp: int = 1, pp: int = 3) -> list[tuple[int, int]]:
    """Of each rank what a head that stages share adds to its weights, and outside torch: against a model that has
    scaled logits, and is else the same."""
    spec = asked.source.spec
    assert spec is not None
    alone = replace(asked, source=replace(asked.source, spec=replace(spec, logits_scale=0.5)))
    return [
        (found.weights_bytes - other.weights_bytes, found.overhead_bytes - other.overhead_bytes)
        for found, other in zip(estimate(asked, tp, pp).ranks, estimate(alone, tp, pp).ranks, strict=True)
    ]


def with_slots(asked: Question, *slots: int) -> Question:
    return replace(asked, device=replace(asked.device, slots=slots))


def test_stages_of_one_host_share_the_head() -> None:
    """The first has half of it, and all have room for what both write."""
    asked = asked_of(LLAMA_8B, "H100", 8, 8)
    assert asked.source.spec is not None
    seqs = estimate(asked, 1, 3).sizes.max_num_seqs
    half = memory.helped_head_bytes(asked.source.spec, seqs, 2)
    room = memory.shared_head_bytes(asked.source.spec, seqs, 2)
    assert min(half, room) > 0
    assert shared_head_of(asked) == [(half, room), (0, room), (0, room)]
    assert shared_head_of(with_slots(asked, 4, 4)) == shared_head_of(asked)
    tied = replace(asked.source.spec, tie_word_embeddings=True)
    assert shared_head_of(replace(asked, source=replace(asked.source, spec=tied))) == shared_head_of(asked)


@pytest.mark.parametrize("per_host", [1, 2])
def test_stages_of_several_hosts_do_not_share_the_head(per_host: int) -> None:
    assert set(shared_head_of(asked_of(LLAMA_8B, "H100", 8, per_host))) == {(0, 0)}
    assert set(shared_head_of(with_slots(asked_of(LLAMA_8B, "H100", 8, 8), 2, 6))) == {(0, 0)}  # the first two fill up


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 200},
        {"quantization": QuantSpec(layout="gptq", kind="int4", group_size=128, has_head=True)},
    ],
)
def test_small_and_quantised_heads_are_not_shared(changes: dict[str, Any]) -> None:
    asked = asked_of(LLAMA_8B, "H100", 8, 8)
    assert asked.source.spec is not None
    spec = replace(asked.source.spec, **changes)
    assert set(shared_head_of(replace(asked, source=replace(asked.source, spec=spec)))) == {(0, 0)}


def test_stages_of_several_ranks_and_of_cpus_do_not_share_the_head() -> None:
    asked = asked_of(LLAMA_8B, "H100", 8, 8)
    weights, overheads = zip(*shared_head_of(asked, 2, 2), strict=True)
    logits = memory.peer_logits_bytes(LLAMA_8B["vocab_size"], 2, estimate(asked, 2, 2).sizes.max_num_seqs, 2)
    assert (set(weights), overheads) == ({0}, (0, 0, logits, logits))  # those of the last stage's ranks alone
    assert set(shared_head_of(replace(asked, device=replace(asked.device, kind="cpu", card=None)))) == {(0, 0)}


@pytest.mark.parametrize(("pp", "asked", "tokens"), [(1, None, 8192), (2, None, 1024), (2, 512, 512), (1, 512, 8192)])
def test_the_largest_step_is_that_of_a_start(pp: int, asked: int | None, tokens: int) -> None:
    """72 GB of parameters: with stages, no step is larger than those beside decoding rows."""
    question = replace(asked_of(QWEN_72B, "H100", 8, 8), max_num_batched_tokens=asked)
    assert estimate(question, 4, pp).sizes.max_num_batched_tokens == tokens


@pytest.mark.parametrize("changes", [{"logits_softcap": 30.0}, {"logits_scale": 0.125}])
def test_logits_that_are_scaled_have_no_place_of_their_own(changes: dict[str, float]) -> None:
    """The worker asks for none (worker.py)."""
    asked = asked_of(LLAMA_8B, "H100", 2, 8)
    assert asked.source.spec is not None
    scaled = replace(asked, source=replace(asked.source, spec=replace(asked.source.spec, **changes)))
    plain, other = (estimate(one, 2, 1) for one in (asked, scaled))
    logits = memory.peer_logits_bytes(LLAMA_8B["vocab_size"], 2, plain.sizes.max_num_seqs, 2)
    assert plain.ranks[0].overhead_bytes - other.ranks[0].overhead_bytes == logits > 0


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("config", [LLAMA_8B, MIXTRAL, QWEN_32B, QWEN_72B, QWEN_30B_A3B])
def test_general_laws_count_what_a_step_takes_as_the_engine_does(config: dict[str, Any], tp: int) -> None:
    """Also what the allocator and graphs hold, and rows that are padded by expert; for models without a spec."""
    asked = asked_of(config, "H100", 8, 8, gib=400.0)
    for changes in ({}, {"enforce_eager": True}, {"max_num_batched_tokens": 512, "max_num_prefill_tokens": 512}):
        changed = replace(asked, **changes)
        (own, *_) = estimate(changed, tp, 1).ranks
        (found, *_) = estimate(replace(changed, source=replace(asked.source, spec=None)), tp, 1).ranks
        assert found.activation_bytes == pytest.approx(own.activation_bytes, rel=0.25)


def test_three_gpus_are_a_plan() -> None:
    asked = asked_of(QWEN_32B, "4090", 3, 8, gib=30.0)
    assert not estimate(asked, 2, 1).fits
    best = recommended(asked)
    assert (best.tp, best.pp) == (3, 1)
    assert "3+3+2 KV heads" in best.reason


def test_illegal_plans_name_tensor_dimension_and_group() -> None:
    scheme = {"quant_method": "awq", "bits": 4, "group_size": 128}
    config = QWEN_72B | {"quantization_config": scheme}
    asked = question(config, gpu="4090", max_devices=8)
    reasons = {(plan.tp, plan.pp): plan.reason for plan in plan_all(asked) if plan.found is None}
    assert "mlp.down_proj: 29568 / 2 = 14784 columns are not whole groups of 128" in reasons[2, 1]
    assert "query heads" in reasons[3, 1]
    assert "groups" not in reasons[3, 1]  # 9856 columns are whole groups
    assert (1, 2) not in reasons
    assert plan_one(asked_of(config, "4090", 8, 8), 2, 1).found is not None  # aphro cuts between groups


def test_concurrency_asks_for_more() -> None:
    few = recommended(asked_of(QWEN_32B, "A100-80GB", 8, 8))
    many = recommended(asked_of(QWEN_32B, "A100-80GB", 8, 8, concurrency=32))
    assert many.num_devices > few.num_devices
    assert many.found is not None
    assert many.found.max_concurrency >= 32


def test_shortage_names_the_rank() -> None:
    found = ask(QWEN_72B, 1, 2, gpu="A100-80GB", engine="aphro", max_model_len=32768, gib=72.0)
    assert not found.fits
    assert "rank 1" in shortage(found)
    assert f"{found.missing_bytes / 2**30:.2f} GiB" in shortage(found)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (QWEN_32B, {"gpu": "4090", "engine": "vllm:0.8.3", "utilization": 0.95, "max_model_len": 32768, "tp": 4}),
        (GPT_OSS_20B, {"utilization": 0.95, "max_model_len": 8192}),
        (LLAMA_8B, {"gpu": "4090", "engine": "aphro"}),
        (QWEN_72B, {"gpu": "4090", "engine": "vllm:0.11.0", "max_model_len": 8192}),
    ],
)
def test_remedies_are_few_and_true(config: dict[str, Any], changes: dict[str, Any]) -> None:
    found = ask(config, **changes)
    assert not found.fits
    ways = remedies(found)
    assert 1 <= len(ways) <= 3
    assert len({way.flags.split()[0] for way in ways}) == len(ways)
    assert all(way.tokens > 0 for way in ways)


def test_shorter_requests_come_before_devices() -> None:
    found = ask(LLAMA_8B, gpu="4090", engine="aphro")
    flags = [way.flags for way in remedies(found)]
    assert any(flag.startswith("--max-model-len") for flag in flags)
    length = int(next(flag for flag in flags if flag.startswith("--max-model-len")).split()[1])
    assert estimate(replace(found.question, max_model_len=length), 1, 1).fits
