"""The rows of a step: their order, tokens and positions, and which of them draw."""

from __future__ import annotations

import random

import pytest
import torch

from aphro_core.layers.batch import Batch, GatheredRows
from aphro_core.messages.steps import ScheduledSequence, StepPlan
from aphro_core.models.spec import DecoderSpec, RopeSpec
from aphro_core.parallel.shard import build_plan
from aphro_core.request import SamplingParams
from aphro_core.worker.batch import BatchBuilder
from aphro_core.worker.sampler import SamplingRow
from aphro_core.worker.sequences import SequenceState

SPEC = DecoderSpec(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=32,
    intermediate_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope=RopeSpec(theta=10000.0, rotary_dim=8),
    max_position_embeddings=256,
    tie_word_embeddings=True,
    sliding_window=20,
    sliding_layers=(True, False, False, False),
)
BLOCK_SIZE = 4


def state(seq_id: int, num_tokens: int) -> SequenceState:
    token_ids = [100 * seq_id + i for i in range(num_tokens)]
    made = SequenceState(SamplingRow(seq_id, SamplingParams(), 0, num_tokens, token_ids, num_tokens))
    made.block_table.extend(range(1000 * seq_id, 1000 * seq_id + -(-num_tokens // BLOCK_SIZE)))
    return made


def build(*scheduled: ScheduledSequence, pp: int = 1) -> Batch:
    shard = build_plan(SPEC, 1, pp).ranks[-1]
    builder = BatchBuilder(SPEC, shard, BLOCK_SIZE, torch.float32)
    sequences = {entry.seq_id: state(entry.seq_id, entry.start + entry.num_tokens) for entry in scheduled}
    return builder.build(StepPlan(1, list(scheduled)), sequences)


def entry(seq_id: int, start: int, num_tokens: int, samples: bool = True) -> ScheduledSequence:
    return ScheduledSequence(seq_id, start, num_tokens, [], [], samples)


def test_decode_rows_first_then_chunks_each_by_length() -> None:
    batch = build(entry(1, 9, 3), entry(2, 30, 1), entry(3, 0, 1), entry(4, 4, 2, samples=False), entry(5, 7, 1))
    assert batch.first_rows == {3: 0, 5: 1, 2: 2, 4: 3, 1: 5}
    assert batch.token_ids.tolist() == [300, 507, 230, 404, 405, 109, 110, 111]
    assert batch.positions.tolist() == [0, 7, 30, 4, 5, 9, 10, 11]
    assert batch.sampled_rows.tolist() == [7, 2, 0, 1]  # in plan order: 1, 2, 3, 5


def test_no_row_draws() -> None:
    batch = build(entry(1, 0, 5, samples=False))
    assert batch.sampled_rows.tolist() == []
    assert batch.sampled_rows.dtype == torch.int64


def test_slots_follow_the_block_table() -> None:
    rows = build(entry(1, 3, 2)).cache_rows
    assert isinstance(rows, GatheredRows)
    # a block is K head 0, K head 1, V head 0, V head 1, of 4 slots each
    first, second = 1000 * 16 + 3, 1001 * 16
    assert rows.slot_rows.tolist() == [
        [first, first + 4, first + 8, first + 12],
        [second, second + 4, second + 8, second + 12],
    ]


@pytest.mark.parametrize(("pp", "windows"), [(1, {20, None}), (4, {None})])
def test_chunks_for_the_windows_of_the_stage_only(pp: int, windows: set[int | None]) -> None:
    rows = build(entry(1, 90, 1), pp=pp).cache_rows
    assert isinstance(rows, GatheredRows)
    assert set(rows.chunks) == windows


def test_rows_of_a_shuffled_plan_are_the_same_rows() -> None:
    """A row's token, position and slots depend on its sequence alone."""
    entries = [entry(seq_id, 5 * seq_id, 1 + seq_id % 3) for seq_id in range(1, 9)]
    seen = set()
    for seed in range(3):
        shuffled = random.Random(seed).sample(entries, len(entries))
        batch = build(*shuffled)
        assert isinstance(batch.cache_rows, GatheredRows)
        rows = zip(
            batch.token_ids.tolist(),
            batch.positions.tolist(),
            map(tuple, batch.cache_rows.slot_rows.tolist()),
            strict=True,
        )
        seen.add(frozenset(rows))
    assert len(seen) == 1
