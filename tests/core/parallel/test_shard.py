"""The sharding plan by property: everything is held once a stage, except KV heads that several ranks share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.errors import ExitCode, PlacementError
from aphro_core.models.quantization import QuantSpec
from aphro_core.models.spec import DecoderSpec, MoeSpec, RopeSpec
from aphro_core.parallel.shard import build_plan, legal_tensor_parallel_sizes


def spec_of(**changes: int) -> DecoderSpec:
    base = DecoderSpec(
        architecture="LlamaForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        norm_eps=1e-5,
        rope=RopeSpec(theta=1e5, rotary_dim=64),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> tuple[DecoderSpec, int, int]:
    num_kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    spec = spec_of(
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * group,
        num_layers=draw(st.integers(1, 20)),
        intermediate_size=draw(st.integers(1, 600)),
        vocab_size=draw(st.integers(1, 3000)),
    )
    legal = legal_tensor_parallel_sizes(spec)
    return spec, draw(st.sampled_from(legal)), draw(st.integers(1, spec.num_layers))


def elements(ranges: list[range]) -> list[int]:
    return [i for each in ranges for i in each]


@given(cases())
def test_every_stage_holds_everything_once(case: tuple[DecoderSpec, int, int]) -> None:
    spec, tp, pp = case
    plan = build_plan(spec, tp, pp)
    assert (plan.tp_size, plan.pp_size, len(plan.ranks)) == (tp, pp, tp * pp)
    assert elements([plan.ranks[pp_rank * tp].layers for pp_rank in range(pp)]) == list(range(spec.num_layers))
    for pp_rank in range(pp):
        stage = plan.ranks[pp_rank * tp : (pp_rank + 1) * tp]
        assert [(rank.rank, rank.pp_rank, rank.tp_rank) for rank in stage] == [
            (pp_rank * tp + tp_rank, pp_rank, tp_rank) for tp_rank in range(tp)
        ]
        assert len({rank.layers for rank in stage}) == 1
        assert elements([rank.heads for rank in stage]) == list(range(spec.num_heads))
        assert elements([rank.mlp for rank in stage]) == list(range(spec.intermediate_size))
        assert elements([rank.vocab for rank in stage]) == list(range(plan.padded_vocab_size))
        assert set(elements([rank.kv_heads for rank in stage])) == set(range(spec.num_kv_heads))
        assert all(rank.layers and rank.heads and rank.mlp for rank in stage)
    assert [rank.has_embedding for rank in plan.ranks] == [rank.pp_rank == 0 for rank in plan.ranks]
    assert [rank.has_head for rank in plan.ranks] == [rank.pp_rank == pp - 1 for rank in plan.ranks]


@given(cases())
def test_local_query_heads_map_on_local_kv_heads_uniformly(case: tuple[DecoderSpec, int, int]) -> None:
    spec, tp, _ = case
    for rank in build_plan(spec, tp, 1).ranks:
        local_group, rest = divmod(len(rank.heads), len(rank.kv_heads))
        assert rest == 0
        for j, head in enumerate(rank.heads):
            assert rank.kv_heads[j // local_group] == head // spec.group_size
        if tp <= spec.num_kv_heads:
            assert local_group == spec.group_size
        else:
            assert len(rank.kv_heads) == 1


@given(cases())
def test_shares_are_as_even_as_whole_units_allow(case: tuple[DecoderSpec, int, int]) -> None:
    spec, tp, pp = case
    plan = build_plan(spec, tp, pp)
    if tp <= spec.num_kv_heads:
        kv_sizes = [len(rank.kv_heads) for rank in plan.ranks[:tp]]
        assert max(kv_sizes) - min(kv_sizes) <= 1
        assert kv_sizes == sorted(kv_sizes, reverse=True)
    else:
        copies = Counter(rank.kv_heads.start for rank in plan.ranks[:tp])
        assert max(copies.values()) - min(copies.values()) <= 1
        for kv_head in range(spec.num_kv_heads):
            sizes = [len(rank.heads) for rank in plan.ranks[:tp] if rank.kv_heads.start == kv_head]
            assert max(sizes) - min(sizes) <= 1
    layer_counts = [len(rank.layers) for rank in plan.ranks[::tp]]
    assert max(layer_counts) - min(layer_counts) <= 1
    assert layer_counts[-1] == min(layer_counts)
    rows = [len(rank.vocab) for rank in plan.ranks]
    assert len(set(rows)) == 1
    unit = 128 if tp > 1 else 64
    assert rows[0] % unit == 0
    assert plan.padded_vocab_size - spec.vocab_size < tp * unit


def test_smollm2_on_two_and_on_five_ranks() -> None:
    two = build_plan(spec_of(), 2, 1).ranks
    assert [(rank.heads, rank.kv_heads) for rank in two] == [(range(6), range(2)), (range(6, 9), range(2, 3))]
    five = build_plan(spec_of(), 5, 1).ranks
    assert [len(rank.heads) for rank in five] == [2, 1, 2, 1, 3]
    assert [rank.kv_heads.start for rank in five] == [0, 0, 1, 1, 2]
    assert all(len(rank.mlp) % 32 == 0 for rank in five)


def test_mlp_units_shrink_for_widths_that_32_does_not_divide_or_share() -> None:
    assert [len(rank.mlp) for rank in build_plan(spec_of(intermediate_size=100), 3, 1).ranks] == [36, 32, 32]
    assert [len(rank.mlp) for rank in build_plan(spec_of(intermediate_size=96), 5, 1).ranks] == [32, 16, 16, 16, 16]
    assert [len(rank.mlp) for rank in build_plan(spec_of(intermediate_size=7), 3, 1).ranks] == [3, 2, 2]


def test_ranks_behind_a_small_vocabulary_are_legal() -> None:
    vocab = [rank.vocab for rank in build_plan(spec_of(vocab_size=70), 3, 1).ranks]
    assert vocab == [range(128), range(128, 256), range(256, 384)]


@pytest.mark.parametrize("vocab_size", [32064, 262208])  # Phi-3, Gemma 3
def test_a_rank_alone_does_not_pad_what_64_divides(vocab_size: int) -> None:
    assert build_plan(spec_of(vocab_size=vocab_size), 1, 1).padded_vocab_size == vocab_size


@pytest.mark.parametrize(
    ("num_layers", "pp", "sizes"),
    [
        (30, 4, [7, 8, 8, 7]),
        (32, 4, [8, 8, 8, 8]),
        (5, 2, [3, 2]),
        (5, 3, [2, 2, 1]),
        (6, 4, [1, 2, 2, 1]),
        (3, 3, [1] * 3),
    ],
)
def test_layers_left_over_go_to_the_stages_before_the_last(num_layers: int, pp: int, sizes: list[int]) -> None:
    plan = build_plan(spec_of(num_layers=num_layers), 1, pp)
    assert [len(rank.layers) for rank in plan.ranks] == sizes


def test_pp_layers_are_taken_as_given() -> None:
    plan = build_plan(spec_of(), 2, 3, (12, 10, 8))
    assert [len(rank.layers) for rank in plan.ranks] == [12, 12, 10, 10, 8, 8]
    assert all(a.stop == b.start for a, b in pairwise(rank.layers for rank in plan.ranks[::2]))


@pytest.mark.parametrize(
    ("pp_layers", "problem"),
    [
        ((10, 20), "10,20 names 2 stages, but pipeline_parallel_size is 3"),
        ((10, 10, 9), "10,10,9 adds up to 29 layers, but the model has 30"),
        ((20, 10, 0), "20,10,0 leaves a stage without layers"),
    ],
)
def test_wrong_pp_layers_are_refused_with_both_numbers(pp_layers: tuple[int, ...], problem: str) -> None:
    with pytest.raises(PlacementError, match=problem) as error:
        build_plan(spec_of(), 1, 3, pp_layers)
    assert error.value.hint == "--pp-layers 10,10,10"


@pytest.mark.parametrize(
    ("tp", "pp", "problem", "hint"),
    [
        (10, 1, "tensor_parallel_size is 10, .* 9 query heads .* allowed: 1 to 9", "-tp 9, and -pp for more devices"),
        (0, 1, "tensor_parallel_size is 0, .* allowed: 1 to 9", "-tp 1"),
        (1, 31, "pipeline_parallel_size is 31, .* 30 layers .* allowed: 1 to 30", "-pp 30"),
        (1, 0, "pipeline_parallel_size is 0", "-pp 1"),
    ],
)
def test_an_illegal_size_names_the_dimension_and_the_nearest_legal_one(
    tp: int, pp: int, problem: str, hint: str
) -> None:
    with pytest.raises(PlacementError, match=problem) as error:
        build_plan(spec_of(), tp, pp)
    assert error.value.hint == hint
    assert error.value.exit_code is ExitCode.PLACEMENT


def test_few_mlp_columns_limit_too() -> None:
    with pytest.raises(PlacementError, match="4 MLP columns"):
        build_plan(spec_of(intermediate_size=4), 5, 1)


def moe_of(num_experts: int = 7) -> DecoderSpec:
    moe = MoeSpec(
        num_experts=num_experts,
        experts_per_token=2,
        intermediate_size=96,
        renormalize=True,
        shared_intermediate_size=64,
    )
    return replace(spec_of(), moe=moe)


def test_experts_are_cut_by_columns_or_handed_out_whole() -> None:
    by_columns = build_plan(moe_of(), 3, 1).ranks
    assert [rank.experts for rank in by_columns] == [range(7)] * 3
    assert [rank.expert_mlp for rank in by_columns] == [range(32), range(32, 64), range(64, 96)]
    assert elements([rank.shared_mlp for rank in by_columns]) == list(range(64))
    whole = build_plan(moe_of(), 3, 1, expert_parallel=True).ranks
    assert [rank.experts for rank in whole] == [range(3), range(3, 5), range(5, 7)]
    assert [rank.expert_mlp for rank in whole] == [range(96)] * 3
    assert elements([rank.shared_mlp for rank in whole]) == list(range(64))


def test_more_ranks_than_experts_leave_some_without() -> None:
    assert [len(rank.experts) for rank in build_plan(moe_of(2), 4, 1, expert_parallel=True).ranks] == [1, 1, 0, 0]


def test_a_dense_model_has_no_experts() -> None:
    assert {len(rank.experts) for rank in build_plan(spec_of(), 2, 1, expert_parallel=True).ranks} == {0}


def gptq_of(group: int, **changes: int) -> DecoderSpec:
    return replace(spec_of(**changes), quantization=QuantSpec(layout="gptq", kind="int4", bits=4, group_size=group))


def test_quantised_columns_are_cut_between_groups() -> None:
    spec = gptq_of(128, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=11008)
    assert list(legal_tensor_parallel_sizes(spec)) == list(range(1, 33))
    for tp in (3, 5, 6, 7, 12):
        ranks = build_plan(spec, tp, 1).ranks
        assert elements([rank.mlp for rank in ranks]) == list(range(11008))
        assert all(len(rank.mlp) % 128 == 0 for rank in ranks)


def test_a_group_of_two_heads_keeps_them_together() -> None:
    spec = gptq_of(128, num_heads=12, num_kv_heads=12, head_dim=64, intermediate_size=1536)
    assert [len(rank.heads) for rank in build_plan(spec, 5, 1).ranks] == [4, 2, 2, 2, 2]
    assert list(legal_tensor_parallel_sizes(spec)) == [1, 2, 3, 4, 5, 6]


def test_a_size_between_groups_names_tensor_dimension_group_and_the_nearest() -> None:
    spec = gptq_of(128, num_heads=16, num_kv_heads=4, head_dim=32, intermediate_size=1536)
    with pytest.raises(PlacementError) as error:
        build_plan(spec, 8, 1)
    assert error.value.message == (
        "tensor_parallel_size is 8, but model.layers.0.self_attn.o_proj.weight is quantised in groups of 128 along "
        "dimension 1, 512 (16 heads of 32), and a rank needs whole groups, allowed: 1 to 4"
    )
    assert error.value.hint == "-tp 4, and -pp for more devices"
    with pytest.raises(
        PlacementError, match=r"down_proj\.weight is quantised in groups of 128 .* 384, .* allowed: 1 to 3"
    ):
        build_plan(gptq_of(128, num_heads=16, num_kv_heads=4, head_dim=128, intermediate_size=384), 4, 1)


def test_columns_that_groups_do_not_divide_are_refused_for_every_size() -> None:
    spec = gptq_of(128, num_heads=16, num_kv_heads=4, head_dim=64, intermediate_size=1500)
    with pytest.raises(
        PlacementError, match=r"down_proj\.weight is quantised in groups of 128 .* 1500, which they do not"
    ):
        build_plan(spec, 1, 1)


def test_experts_between_groups_are_named_unless_they_stay_whole() -> None:
    moe = MoeSpec(num_experts=8, experts_per_token=2, intermediate_size=384, renormalize=True)
    spec = replace(
        gptq_of(128, num_heads=16, num_kv_heads=4, head_dim=128, intermediate_size=1000),
        architecture="MixtralForCausalLM",
        moe=moe,
    )
    with pytest.raises(PlacementError, match=r"experts\.0\.w2\.weight is quantised in groups of 128 .* 384, .* 1 to 3"):
        build_plan(spec, 4, 1)
    plan = build_plan(spec, 4, 1, expert_parallel=True)
    assert [len(rank.experts) for rank in plan.ranks] == [2, 2, 2, 2]
    assert all(len(rank.expert_mlp) == 384 for rank in plan.ranks)
