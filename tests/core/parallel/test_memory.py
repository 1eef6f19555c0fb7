"""The memory model against hand calculation; tests/core/worker/test_loader.py holds weights against loaded tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from aphro_kernels.gated_gemm import ROWS
from aphro_kernels.row_tiles import plan_tiles
from aphro_kernels.skinny_linear import build_skinny_workspace
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.distributed.stage_lines import Messages, num_bytes
from aphro_core.layers.expert_stacks import _WIDE_FROM
from aphro_core.models.quantization import QuantSpec
from aphro_core.models.spec import DecoderSpec, MoeSpec, RopeSpec
from aphro_core.parallel import memory
from aphro_core.parallel.shard import VOCAB_UNIT, build_plan, head_halves

GIB = 2**30
LLAMA_8B = DecoderSpec(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope=RopeSpec(theta=5e5, rotary_dim=128),
    max_position_embeddings=131_072,
    tie_word_embeddings=False,
)


def test_llama_8b_has_its_published_parameters_also_over_four_stages() -> None:
    (rank,) = build_plan(LLAMA_8B, 1, 1).ranks
    assert memory.weights_bytes(LLAMA_8B, rank, 2) == 2 * 8_030_261_248
    stages = [memory.weights_bytes(LLAMA_8B, stage, 2) for stage in build_plan(LLAMA_8B, 1, 4).ranks]
    assert sum(stages) == 2 * 8_030_261_248
    assert [round(stage / GIB, 2) for stage in stages] == [4.23, 3.25, 3.25, 4.23]


def test_llama_8b_at_tp_3_costs_its_largest_rank_three_kv_heads() -> None:
    ranks = build_plan(LLAMA_8B, 3, 1).ranks
    per_token = [memory.kv_block_bytes(LLAMA_8B, rank, 16, 2) // 16 for rank in ranks]
    assert per_token == [49_152, 49_152, 32_768]


def test_a_copied_kv_head_counts_on_every_rank() -> None:
    spec = replace(LLAMA_8B, num_kv_heads=2)
    blocks = {memory.kv_block_bytes(spec, rank, 16, 2) for rank in build_plan(spec, 4, 1).ranks}
    assert blocks == {2 * 32 * 1 * 16 * 128 * 2}


def test_stages_split_the_block() -> None:
    whole = memory.kv_block_bytes(LLAMA_8B, build_plan(LLAMA_8B, 1, 1).ranks[0], 16, 2)
    stages = [memory.kv_block_bytes(LLAMA_8B, rank, 16, 2) for rank in build_plan(LLAMA_8B, 1, 3).ranks]
    assert sum(stages) == whole


def test_the_head_dominates_many_sequences_and_the_mlp_many_tokens() -> None:
    first, last = build_plan(LLAMA_8B, 1, 2).ranks
    few = memory.activation_bytes(LLAMA_8B, last, 2048, 1, 2)
    many = memory.activation_bytes(LLAMA_8B, last, 2048, 256, 2)
    assert many - few > memory.LOGITS_COPIES * 256 * 128_256 * 4 - 2048 * (3 * 14_336 + 4096) * 2 - 1
    assert memory.activation_bytes(LLAMA_8B, first, 2048, 256, 2) == memory.activation_bytes(
        LLAMA_8B, first, 2048, 1, 2
    )
    assert memory.activation_bytes(LLAMA_8B, last, 64, 256, 2) == memory.activation_bytes(LLAMA_8B, last, 64, 64, 2)
    forward = 2048 * 2 * (3 * 14_336 + 3 * 4096)  # the measured law of served models
    assert memory.activation_bytes(LLAMA_8B, first, 2048, 1, 2) >= forward


def test_gpus_keep_room_for_allocator_and_modules_and_for_graphs_where_they_are_captured() -> None:
    (rank,) = build_plan(LLAMA_8B, 1, 1).ranks

    def working(is_gpu: bool, enforce_eager: bool, max_model_len: int = 8192) -> int:
        return memory.working_bytes(
            LLAMA_8B,
            rank,
            max_num_batched_tokens=8192,
            max_num_seqs=512,
            dtype_bytes=2,
            is_gpu=is_gpu,
            max_model_len=max_model_len,
            block_size=16,
            enforce_eager=enforce_eager,
        )

    step = memory.activation_bytes(LLAMA_8B, rank, 8192, 512, 2)
    assert working(False, False) == working(False, True) == step
    held = 1.67 * GIB  # by torch after steps of 8,192 tokens of this shape, on an H100
    fixed = memory.fixed_bytes(2048, 512, 4096, 128_256, 2)
    tables = memory.tables_bytes(512, 8192, 16)
    assert held < working(True, True) - fixed - 2 * tables < 1.15 * held
    assert working(True, False) == working(True, True) + memory.graph_bytes(LLAMA_8B, rank, 2048, 512, 2) + tables
    long = memory.tables_bytes(512, 131_072, 16)
    assert long == 513 * 8192 * 4
    assert working(True, True, 131_072) - working(True, True) > 3 * (long - tables)


@given(st.integers(-(2**40), 2**40), st.integers(1, 2**24))
def test_blocks_fit_their_budget_and_one_more_would_not(budget: int, block: int) -> None:
    blocks = memory.num_blocks(budget, block)
    assert blocks >= 0
    assert blocks * block <= max(budget, 0) < (blocks + 1) * block


@given(st.integers(1, 10_000), st.sampled_from([8, 16, 32]))
def test_a_request_fills_whole_blocks(tokens: int, block_size: int) -> None:
    blocks = memory.blocks_per_request(tokens, block_size)
    assert (blocks - 1) * block_size < tokens <= blocks * block_size
    assert memory.max_useful_blocks(7, tokens, block_size) == 7 * blocks


def test_the_limiting_rank_has_the_fewest_blocks() -> None:
    ranks = [
        memory.RankMemory(0, budget=1000, weights=500, activations=100, block=10),
        memory.RankMemory(1, budget=1000, weights=600, activations=100, block=5),
        memory.RankMemory(2, budget=100, weights=600, activations=100, block=5),
    ]
    assert [rank.num_blocks for rank in ranks] == [40, 60, 0]
    assert memory.limiting_rank(ranks).rank == 2
    assert memory.limiting_rank(ranks[:2]).rank == 0


@given(st.integers(1, 8), st.integers(1, 20_000))
def test_steps_that_are_graphs_are_whole_units_and_no_larger_than_steps(tp_size: int, most_tokens: int) -> None:
    tokens = memory.graph_tokens(LLAMA_8B, tp_size, most_tokens)
    least, most = memory.GRAPH_TOKENS
    assert tokens == most_tokens < 2048 * tp_size or tokens % least == 0
    assert tokens <= min(most, most_tokens)
    assert memory.graph_tokens(LLAMA_8B, 1, 8192) == 2048


def test_rows_that_stand_by_expert_are_counted_with_their_padding() -> None:
    """512 tokens of Qwen3-30B-A3B: 4,096 slots, and up to 127 padded rows for each of the 128 experts."""
    moe = MoeSpec(num_experts=128, experts_per_token=8, intermediate_size=768, renormalize=True)
    spec = replace(LLAMA_8B, hidden_size=2048, moe=moe)
    (rank,) = build_plan(spec, 1, 1).ranks
    assert (min(_WIDE_FROM.values()), ROWS) == (memory.SPREAD_FROM, memory.SPREAD_ROWS)
    tiles = plan_tiles(torch.arange(8).repeat(512, 1), 0, 128, ROWS)
    merged = len(tiles.slots) * (2 * 768 + 2048)  # fp8: gate and up beside the rows' two numbers of a byte each
    assert memory.activation_bytes(spec, rank, 512, 0, 2) >= 2 * merged


def test_a_head_is_shared_by_stages_of_single_gpus_with_plain_logits_and_room_for_two_halves() -> None:
    assert memory.shares_head(LLAMA_8B, 1, 2)
    assert memory.shares_head(LLAMA_8B, 1, 4)
    assert memory.shares_head(replace(LLAMA_8B, tie_word_embeddings=True, vocab_size=2 * VOCAB_UNIT), 1, 2)
    assert not memory.shares_head(LLAMA_8B, 1, 1)
    assert not memory.shares_head(LLAMA_8B, 2, 2)
    for changes in ({"logits_softcap": 30.0}, {"logits_scale": 0.125}, {"vocab_size": 2 * VOCAB_UNIT - 1}):
        assert not memory.shares_head(replace(LLAMA_8B, **changes), 1, 2)


def test_a_quantised_head_is_not_shared_and_one_that_is_left_whole_is() -> None:
    def shares(*, is_tied: bool = False, **changes: object) -> bool:
        found = QuantSpec(**{"kind": "int4", "group_size": 32, "layout": "gptq"} | changes)  # type: ignore[arg-type]
        return memory.shares_head(replace(LLAMA_8B, quantization=found, tie_word_embeddings=is_tied), 1, 2)

    assert shares()
    assert shares(kind="int8", layout="online")
    assert not shares(has_head=True)
    assert shares(has_head=True, ignored=("lm_head",))
    assert not shares(layout="gguf", block_formats={"lm_head.weight": "Q6_K"})
    embedding = {"model.embed_tokens.weight": "Q6_K"}
    assert shares(layout="gguf", block_formats=embedding)
    assert not shares(layout="gguf", block_formats=embedding, is_tied=True)  # the last stage's copy is packed, too


@given(st.integers(2 * VOCAB_UNIT, 300_000))
def test_halves_of_a_head_are_whole_blocks_of_one_width_and_both_have_something(vocab_size: int) -> None:
    own, other = head_halves(vocab_size)
    assert (own.start, own.stop, len(own)) == (0, other.start, len(other))
    assert len(own) % VOCAB_UNIT == 0
    assert own.stop < vocab_size <= other.stop < vocab_size + 2 * VOCAB_UNIT


def test_a_shared_head_costs_the_first_stage_its_half_and_each_what_both_write_to() -> None:
    """128,256 tokens are 1,002 blocks of 128, and either half has 501."""
    workspace = build_skinny_workspace(torch.device("cpu"))
    assert workspace.parts.nbytes + workspace.arrivals.nbytes == memory.PRODUCT_BYTES
    assert memory.helped_head_bytes(LLAMA_8B, 256, 2) == 501 * 128 * 8192 + 256 * 8192 + memory.PRODUCT_BYTES
    plan = build_plan(LLAMA_8B, 1, 2)
    plain = Messages(num_tokens=8192, row_bytes=8192, num_draws=256)
    both = num_bytes(plan, replace(plain, vocab_size=128_256)) - num_bytes(plan, plain)
    assert 0 <= both - memory.shared_head_bytes(LLAMA_8B, 256, 2) < 1024  # flags
