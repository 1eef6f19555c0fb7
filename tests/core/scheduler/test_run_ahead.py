"""Plans that run ahead of their tokens: rows whose token nobody has read, late ends, blocks that stay until then."""

from __future__ import annotations

from itertools import pairwise

from tests.core.scheduler.fake_worker import run_alone
from tests.core.scheduler.simulation import Setup, Simulation, sequence
from tests.core.scheduler.test_scheduler_steps import prompt, rows, started

AHEAD = Setup(max_in_flight=2, run_ahead=1)


def test_the_next_row_is_planned_before_the_last_token_is_read() -> None:
    simulation = started(AHEAD, [6])
    first, second = simulation.schedule(), simulation.schedule()
    assert simulation.schedule() is None, "one plan ahead, no more"
    assert (rows(first), rows(second)) == ([(0, 0, 6)], [(0, 6, 1)])
    assert second is not None
    assert second.scheduled[0].token_ids == []
    assert second.scheduled[0].samples
    simulation.answer()
    assert rows(simulation.schedule()) == [(0, 7, 1)]
    assert simulation.num_again == 1
    simulation.add(sequence(1, prompt(1, 3)))
    simulation.answer()
    fourth = simulation.schedule()
    assert rows(fourth) == [(0, 8, 1), (1, 0, 3)]
    assert fourth is not None
    assert fourth.scheduled[0].token_ids == simulation.clients[0].token_ids[:2], "told with rows of another kind"


def test_a_long_prompt_does_not_wait_for_its_first_chunk() -> None:
    simulation = started(Setup(max_in_flight=2, run_ahead=1, max_num_batched_tokens=8), [20])
    assert [rows(simulation.schedule()) for _ in range(2)] == [[(0, 0, 8)], [(0, 8, 8)]]


def test_a_stop_token_is_found_late_and_its_row_ahead_is_dropped() -> None:
    simulation = Simulation(AHEAD)
    tokens, _, _ = run_alone(sequence(0, prompt(0, 6), max_tokens=3), 1000, 64)
    simulation.add(sequence(0, prompt(0, 6), max_tokens=30, stop=(tokens[1],)))
    simulation.schedule()
    simulation.schedule()
    simulation.answer()
    assert rows(simulation.schedule()) == [(0, 7, 1)]  # computed for nothing: the answer before it is the stop token
    outputs = simulation.answer()
    assert outputs[0].finish_reason == "stop"
    assert simulation.scheduler.schedule() is None
    assert simulation.scheduler.stats().num_blocks_used == 2, "its blocks are still written to"
    assert simulation.answer() == []
    assert simulation.scheduler.stats().num_blocks_used == 0
    assert simulation.clients[0].token_ids == tokens[:2]


def test_the_length_limit_is_known_beforehand() -> None:
    simulation = started(AHEAD, [6], max_tokens=2)
    simulation.schedule()
    simulation.schedule()
    simulation.answer()
    assert simulation.scheduler.schedule() is None
    assert simulation.answer()[0].finish_reason == "length"
    assert not simulation.scheduler.has_work


def test_whoever_counts_tokens_waits_for_them() -> None:
    simulation = Simulation(AHEAD)
    simulation.add(sequence(0, prompt(0, 5), repetition_penalty=1.2))
    simulation.add(sequence(1, prompt(1, 5)))
    assert rows(simulation.schedule()) == [(0, 0, 5), (1, 0, 5)]
    assert rows(simulation.schedule()) == [(1, 5, 1)]
    simulation.answer()
    assert rows(simulation.schedule()) == [(0, 5, 1), (1, 6, 1)]


def test_a_block_is_found_by_others_once_its_tokens_are_known() -> None:
    simulation = Simulation(Setup(max_in_flight=2, run_ahead=1, block_size=4))
    simulation.add(sequence(0, prompt(0, 3), max_tokens=12))
    for _ in range(3):  # tokens 0 to 3 are known after the first answer
        simulation.step()
    known = [*prompt(0, 3), *simulation.clients[0].token_ids]
    simulation.add(sequence(1, [*known[:4], 7], max_tokens=1))
    simulation.drain()
    assert simulation.clients[1].outputs[0].num_cached_tokens == 4


def test_prompts_alone_may_fill_a_larger_step() -> None:
    setup = Setup(max_num_batched_tokens=8, max_num_prefill_tokens=20, max_in_flight=2, run_ahead=1)
    simulation = started(setup, [12, 12, 12])
    assert rows(simulation.schedule()) == [(0, 0, 12), (1, 0, 8)]
    assert rows(simulation.schedule()) == [(0, 12, 1), (1, 8, 4), (2, 0, 3)]


def test_stages_of_a_pipeline_take_turns() -> None:
    """Each half of the rows is in every second plan, though both may be planned ahead."""
    simulation = started(Setup(max_in_flight=3, run_ahead=1), [4, 4, 4, 4])
    plans = [simulation.schedule() for _ in range(3)]
    for _ in range(7):
        simulation.answer()
        plans.append(simulation.schedule())
    members = [{seq_id for seq_id, _, _ in rows(plan)} for plan in plans]
    for before, after in pairwise(members[4:]):
        assert (before | after, before & after) == ({0, 1, 2, 3}, set())
