"""What is shared between sequences, what is not, and how it is counted."""

from __future__ import annotations

import pytest

from tests.core.scheduler.simulation import Setup, Simulation, sequence

SHARED = list(range(100, 112))  # three blocks of four


def test_a_later_prompt_starts_behind_what_an_earlier_one_computed() -> None:
    simulation = Simulation(Setup())
    simulation.add(sequence(1, [*SHARED, 1]))
    simulation.drain()
    simulation.add(sequence(2, [*SHARED, 2, 2]))
    plan = simulation.schedule()
    assert plan is not None
    assert [(row.start, row.num_tokens, len(row.new_block_ids)) for row in plan.scheduled] == [(12, 2, 4)]
    simulation.drain()
    assert [output.num_cached_tokens for output in simulation.clients[2].outputs] == [12] + [0] * 7
    stats = simulation.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (13 + 14, 12)


def test_equal_prompts_that_come_together_share_one_prefill() -> None:
    simulation = Simulation(Setup())
    for seq_id in range(4):
        simulation.add(sequence(seq_id, [*SHARED, 1, 2]))
    plan = simulation.schedule()
    assert plan is not None
    assert [(row.start, row.num_tokens) for row in plan.scheduled] == [(0, 14), (12, 2), (12, 2), (12, 2)]
    simulation.drain()


def test_a_block_is_shared_as_soon_as_the_chunk_that_fills_it_is_scheduled_and_not_before() -> None:
    simulation = Simulation(Setup(max_in_flight=2, max_num_batched_tokens=7))
    simulation.add(sequence(1, [*SHARED, 1]))
    simulation.add(sequence(2, [*SHARED, 2]))
    first, second = simulation.schedule(), simulation.schedule()
    assert first is not None
    assert second is not None
    assert [(row.seq_id, row.start, row.num_tokens) for row in first.scheduled] == [(1, 0, 7)]
    assert [(row.seq_id, row.start, row.num_tokens) for row in second.scheduled] == [(2, 4, 7)]
    simulation.drain()


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    simulation = Simulation(Setup())
    simulation.add(sequence(1, SHARED))
    simulation.add(sequence(2, SHARED))
    plan = simulation.schedule()
    assert plan is not None
    assert [(row.start, row.num_tokens) for row in plan.scheduled] == [(0, 12), (8, 4)]
    simulation.drain()


def test_output_is_found_by_a_prompt_that_quotes_it() -> None:
    simulation = Simulation(Setup())
    simulation.add(sequence(1, SHARED, max_tokens=10))
    simulation.drain()
    simulation.add(sequence(2, SHARED + simulation.clients[1].token_ids))
    simulation.drain()
    assert simulation.clients[2].outputs[0].num_cached_tokens == 20  # the last token of 22 was never fed


def test_other_salts_share_nothing() -> None:
    simulation = Simulation(Setup())
    for seq_id, salt in enumerate(["", "a", "b", "a"]):
        simulation.add(sequence(seq_id, [*SHARED, 1], salt=salt))
        simulation.drain()
    assert [simulation.clients[i].outputs[0].num_cached_tokens for i in range(4)] == [0, 0, 0, 12]


def test_without_the_cache_nothing_is_looked_up() -> None:
    simulation = Simulation(Setup(enable_prefix_caching=False))
    for seq_id in range(2):
        simulation.add(sequence(seq_id, [*SHARED, 1]))
        simulation.drain()
    stats = simulation.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (0, 0)
    assert simulation.clients[1].outputs[0].num_cached_tokens == 0
    assert not simulation.scheduler._blocks._by_hash


def test_content_is_forgotten_when_its_space_is_needed() -> None:
    simulation = Simulation(Setup(num_blocks=5))
    for seq_id, text in enumerate([SHARED, list(range(200, 216)), SHARED]):
        simulation.add(sequence(seq_id, [*text, 1], max_tokens=2))
        simulation.drain()
    assert simulation.clients[2].outputs[0].num_cached_tokens == 0


def test_prefill_is_not_started_on_blocks_that_are_counted_twice() -> None:
    """Found blocks that nobody holds are free blocks too: what is found and what is new must both fit."""
    simulation = Simulation(Setup(num_blocks=5))
    simulation.add(sequence(1, [*SHARED, 1], max_tokens=2))
    simulation.drain()
    simulation.add(sequence(2, [7], max_tokens=3))
    simulation.add(sequence(3, [*SHARED, 1], max_tokens=2))
    simulation.drain()
    assert simulation.clients[3].outputs[0].num_cached_tokens == 12


def test_a_shared_prefix_needs_room_once() -> None:
    simulation = Simulation(Setup(num_blocks=7))
    for seq_id in range(3):
        simulation.add(sequence(seq_id, [*SHARED, seq_id], max_tokens=3))
    plan = simulation.schedule()
    assert plan is not None
    assert len(plan.scheduled) == 2  # 3 + 1 + 1 blocks; the third one would leave 1 for two that run
    assert simulation.scheduler.stats().num_blocks_used == 5
    simulation.drain()


def test_a_sequence_aborted_in_flight_still_fills_the_blocks_that_others_found() -> None:
    simulation = Simulation(Setup(max_in_flight=2, max_num_batched_tokens=13))
    simulation.add(sequence(1, [*SHARED, 1]))
    simulation.add(sequence(2, [*SHARED, 2]))
    assert simulation.schedule() is not None
    simulation.abort([1])
    plan = simulation.schedule()
    assert plan is not None
    assert [(row.seq_id, row.start) for row in plan.scheduled] == [(2, 12)]
    simulation.drain()


# --- prompt logprobs and going on ---


@pytest.mark.parametrize("max_num_batched_tokens", [1, 5, 64])
@pytest.mark.parametrize("length", [1, 2, 12, 13])
def test_prompt_logprobs_are_complete_whatever_is_cached(length: int, max_num_batched_tokens: int) -> None:
    simulation = Simulation(Setup(max_num_batched_tokens=max_num_batched_tokens))
    text = [*SHARED, 1][:length]
    simulation.add(sequence(1, text))
    simulation.drain()
    simulation.add(sequence(2, text, prompt_logprobs=True))
    simulation.add(sequence(3, text))
    simulation.drain()  # checks that the entries are those of the prompt, on the first output only
    assert simulation.clients[2].outputs[0].num_cached_tokens == 0
    assert simulation.scheduler.stats().num_prefix_queries == 2 * length


def test_after_a_preemption_prompt_logprobs_are_not_asked_for_again() -> None:
    simulation = Simulation(Setup(num_blocks=6))
    simulation.add(sequence(1, [5] * 8, max_tokens=15))
    simulation.add(sequence(2, [6] * 4, max_tokens=15, prompt_logprobs=True))
    asked = []
    while simulation.scheduler.has_work:
        plan = simulation.schedule()
        assert plan is not None
        asked += [new.sampling.prompt_logprobs for new in plan.new if new.seq_id == 2]
        simulation.answer()
    simulation.drain()
    assert simulation.num_preemptions >= 1
    assert asked == [1] + [None] * (len(asked) - 1)
    assert len(asked) >= 2


def test_a_preemption_within_the_prompt_starts_its_logprobs_anew() -> None:
    simulation = Simulation(Setup(num_blocks=5, max_num_batched_tokens=3, max_model_len=18))
    simulation.add(sequence(1, [5, 5, 5], max_tokens=15))
    simulation.add(sequence(2, [6] * 11, max_tokens=3, prompt_logprobs=True))
    simulation.drain()
    assert simulation.num_preemptions == 1
    client = simulation.clients[2]
    assert client.outputs[0].prompt_logprobs is not None
    assert len(client.outputs[0].prompt_logprobs) == 10


def test_a_resumed_sequence_has_told_its_prompt_logprobs_and_counts_prompt_tokens_only() -> None:
    simulation = Simulation(Setup())
    simulation.add(sequence(1, [*SHARED, 1, 2, 3, 4, 5]))
    simulation.drain()
    simulation.add(sequence(2, [*SHARED, 1], outputs=(2, 3, 4, 5), prompt_logprobs=True))
    plan = simulation.schedule()
    assert plan is not None
    assert plan.new[0].sampling.prompt_logprobs is None
    assert plan.scheduled[0].start == 16
    simulation.drain()
    assert simulation.clients[2].outputs[0].num_cached_tokens == 13
    assert simulation.scheduler.stats().num_prefix_hits == 13
