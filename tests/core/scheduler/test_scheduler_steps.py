"""What each step holds: decode first, chunks, order of arrival, even shares for a pipeline, preemption."""

from __future__ import annotations

import pytest

from aphro_core.messages.steps import StepPlan
from tests.core.scheduler.simulation import Setup, Simulation, sequence


def rows(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(seq_id, start, num_tokens) of each row."""
    assert plan is not None
    return [(row.seq_id, row.start, row.num_tokens) for row in plan.scheduled]


def prompt(seq_id: int, length: int) -> list[int]:
    """A prompt that shares no block with another's."""
    return [1000 + seq_id] * length


def started(setup: Setup, lengths: list[int], *, max_tokens: int = 30) -> Simulation:
    """Sequences 0, 1, ... with prompts of these lengths, added."""
    simulation = Simulation(setup)
    for seq_id, length in enumerate(lengths):
        simulation.add(sequence(seq_id, prompt(seq_id, length), max_tokens=max_tokens))
    return simulation


def step(simulation: Simulation) -> StepPlan:
    """One plan, answered."""
    plan = simulation.schedule()
    assert plan is not None
    simulation.answer()
    return plan


# --- one plan at a time ---


def test_without_work_there_is_no_plan() -> None:
    assert Setup().scheduler().schedule() is None


def test_a_prompt_is_one_row_and_then_each_token_is_one() -> None:
    simulation = started(Setup(), [6])
    first, second, third = step(simulation), step(simulation), step(simulation)
    assert (rows(first), rows(second), rows(third)) == ([(0, 0, 6)], [(0, 6, 1)], [(0, 7, 1)])
    assert [new.token_ids for new in first.new] == [prompt(0, 6)]
    assert first.scheduled[0].token_ids == []
    assert second.new == []
    assert second.scheduled[0].token_ids == simulation.clients[0].token_ids[:1]
    assert all(plan.scheduled[0].samples for plan in (first, second, third))


def test_blocks_come_with_the_first_row_and_then_one_at_each_border() -> None:
    simulation = started(Setup(block_size=4), [6])
    gained = [len(step(simulation).scheduled[0].new_block_ids) for _ in range(8)]
    assert gained == [2, 0, 0, 1, 0, 0, 0, 1]  # positions 0-5, 6, 7, 8, ...


def test_a_long_prompt_is_cut_into_chunks_and_only_the_last_one_draws() -> None:
    simulation = started(Setup(max_num_batched_tokens=8), [20])
    plans = [step(simulation) for _ in range(3)]
    assert [rows(plan) for plan in plans] == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 4)]]
    assert [plan.scheduled[0].samples for plan in plans] == [False, False, True]


def test_decode_rows_come_first_and_prompts_fill_the_rest_of_the_budget() -> None:
    simulation = started(Setup(max_num_batched_tokens=8), [3, 3])
    step(simulation)
    for seq_id, length in ((2, 10), (3, 4)):
        simulation.add(sequence(seq_id, prompt(seq_id, length)))
    assert rows(step(simulation)) == [(0, 3, 1), (1, 3, 1), (2, 0, 6)]
    assert rows(step(simulation)) == [(0, 4, 1), (1, 4, 1), (2, 6, 4), (3, 0, 2)]
    assert rows(step(simulation)) == [(0, 5, 1), (1, 5, 1), (2, 10, 1), (3, 2, 2)]


def test_max_num_seqs_bounds_what_runs() -> None:
    simulation = started(Setup(max_num_seqs=2), [3, 3, 3], max_tokens=2)
    assert rows(step(simulation)) == [(0, 0, 3), (1, 0, 3)]
    assert rows(step(simulation)) == [(0, 3, 1), (1, 3, 1)]
    assert rows(step(simulation)) == [(2, 0, 3)]


def test_a_small_request_does_not_overtake_a_large_one_that_waits() -> None:
    simulation = started(Setup(num_blocks=6, block_size=4), [4, 16, 1], max_tokens=8)
    order = [new.seq_id for _ in range(40) if simulation.scheduler.has_work for new in step(simulation).new]
    assert list(dict.fromkeys(order)) == [0, 1, 2]


@pytest.mark.parametrize(("num_blocks", "num_started"), [(2, 1), (3, 2), (4, 2), (5, 3), (7, 4)])
def test_what_starts_leaves_a_spare_block_for_each_that_runs(num_blocks: int, num_started: int) -> None:
    """With ``k`` running on a block each, one more needs its own and ``k`` spare ones."""
    simulation = started(Setup(num_blocks=num_blocks, block_size=4), [4] * 4, max_tokens=5)
    assert len(rows(simulation.schedule())) == num_started


def test_an_older_prompt_goes_on_even_if_younger_rows_could_fill_the_budget() -> None:
    simulation = started(
        Setup(max_num_batched_tokens=4, max_in_flight=2, num_blocks=128), [40, 1, 1, 1, 1], max_tokens=20
    )
    while simulation.clients[4].token_ids == []:
        simulation.step()
    simulation.drain()  # every plan is checked to advance the oldest sequence that is not in flight


# --- preemption ---


def preempted(*, enable_prefix_caching: bool = True) -> tuple[Simulation, StepPlan]:
    """Two sequences in a cache that holds both only for a while, and the plan that took the younger one's blocks."""
    simulation = started(
        Setup(num_blocks=6, block_size=4, enable_prefix_caching=enable_prefix_caching), [8, 4], max_tokens=15
    )
    for _ in range(40):
        plan = step(simulation)
        if simulation.scheduler.stats().num_preemptions:
            return simulation, plan
    raise AssertionError("nobody was preempted")


def test_the_youngest_gives_up_its_blocks_and_is_computed_again() -> None:
    simulation, plan = preempted()
    assert (plan.released, [row.seq_id for row in plan.scheduled]) == ([1], [0])
    had = list(simulation.clients[1].token_ids)
    assert had
    while not plan.new:
        plan = step(simulation)
    assert plan.new[0].seq_id == 1
    assert plan.new[0].token_ids == prompt(1, 4) + had
    assert plan.new[0].num_prompt_tokens == 4
    simulation.drain()


def test_a_preempted_sequence_starts_before_those_that_have_waited() -> None:
    simulation, _ = preempted()
    simulation.add(sequence(2, prompt(2, 1)))
    order = [new.seq_id for _ in range(60) if simulation.scheduler.has_work for new in step(simulation).new]
    assert order == [1, 2]


def test_aborting_a_preempted_sequence_leaves_nothing() -> None:
    simulation, _ = preempted()
    simulation.abort([1])
    assert simulation.scheduler.stats().num_waiting == 0
    simulation.drain()


def test_blocks_of_a_sequence_in_flight_are_never_taken() -> None:
    """The oldest waits for the younger one's answer, then takes its blocks."""
    simulation = started(Setup(num_blocks=6, block_size=4, max_in_flight=2), [8, 7], max_tokens=12)
    while simulation.schedule() or in_flight(simulation) != [[1]]:  # until nothing can run while only 1 is in flight
        if len(simulation.in_flight) == 2:
            simulation.answer()
    assert simulation.scheduler.stats().num_running == 2
    assert simulation.scheduler._blocks.num_free == 0
    simulation.answer()
    plan = simulation.schedule()
    assert plan is not None
    assert (plan.released, rows(plan)) == ([1], [(0, 12, 1)])
    simulation.drain()


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_cache_of_a_quarter_of_the_demand_costs_less_than_half_again(
    max_in_flight: int, enable_prefix_caching: bool
) -> None:
    setup = Setup(
        num_blocks=56,
        max_num_seqs=24,
        max_in_flight=max_in_flight,
        enable_prefix_caching=enable_prefix_caching,
        max_num_batched_tokens=128,
    )
    simulation = started(setup, [4 + seq_id % 7 for seq_id in range(24)], max_tokens=30)
    needed = sum(len(client.add.prompt_token_ids) + 29 for client in simulation.clients.values())
    assert needed / setup.block_size > 3.5 * setup.num_blocks
    simulation.drain()
    assert simulation.num_preemptions >= 10
    assert simulation.worker.num_tokens_computed <= 1.5 * needed


# --- several plans in flight ---


def in_flight(simulation: Simulation) -> list[list[int]]:
    """The sequences of each plan in flight."""
    return [[row.seq_id for row in plan.scheduled] for plan, _ in simulation.in_flight]


def test_no_more_plans_than_stages() -> None:
    simulation = started(Setup(max_in_flight=2, max_num_batched_tokens=2), [2, 2, 2])
    assert simulation.schedule() is not None
    assert simulation.schedule() is not None
    assert simulation.schedule() is None
    assert simulation.scheduler.num_in_flight == 2


def test_a_sequence_alone_is_in_one_plan_at_a_time() -> None:
    simulation = started(Setup(max_in_flight=4), [20])
    assert rows(simulation.schedule()) == [(0, 0, 20)]
    assert simulation.schedule() is None
    simulation.answer()
    assert rows(simulation.schedule()) == [(0, 20, 1)]
    assert simulation.schedule() is None


def test_prompts_are_shared_over_the_free_stages_and_none_is_cut_for_it() -> None:
    simulation = started(Setup(max_in_flight=4, num_blocks=128), [8] * 8)
    while simulation.schedule():
        pass
    assert in_flight(simulation) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    simulation = started(Setup(max_in_flight=2), [20, 4])
    while simulation.schedule():
        pass
    assert in_flight(simulation) == [[0], [1]]


def test_prompts_that_were_begun_are_shared_as_well() -> None:
    simulation = started(Setup(max_in_flight=2, max_num_batched_tokens=8, num_blocks=128), [40, 40])
    simulation.step()
    for _ in range(3):
        while simulation.schedule():
            pass
        assert sorted(in_flight(simulation)) == [[0], [1]]
        simulation.answer()


@pytest.mark.parametrize("num_sequences", [2, 3, 5, 8])
@pytest.mark.parametrize("max_in_flight", [2, 3, 4])
def test_rows_are_shared_evenly_and_every_stage_has_work(num_sequences: int, max_in_flight: int) -> None:
    simulation = started(Setup(max_in_flight=max_in_flight, num_blocks=128), [4] * num_sequences, max_tokens=40)
    for _ in range(3 * max_in_flight):
        simulation.step()
    for _ in range(2 * max_in_flight):
        while simulation.schedule():
            pass
        plans = in_flight(simulation)
        assert sorted(seq_id for plan in plans for seq_id in plan) == list(range(num_sequences))
        assert max(map(len, plans)) <= -(-num_sequences // max_in_flight)
        simulation.answer()


def test_one_large_micro_batch_spreads_over_the_stages() -> None:
    simulation = started(Setup(max_in_flight=2), [1])
    simulation.schedule()
    for seq_id in range(1, 6):  # they all find one stage free
        simulation.add(sequence(seq_id, prompt(seq_id, 2), max_tokens=30))
    simulation.schedule()
    assert in_flight(simulation) == [[0], [1, 2, 3, 4, 5]]
    for _ in range(6):
        simulation.step()
    while simulation.schedule():
        pass
    assert [len(plan) for plan in in_flight(simulation)] == [3, 3]


def test_context_that_is_read_takes_room_from_prompts_down_to_a_quarter() -> None:
    setup = Setup(
        max_num_batched_tokens=32, max_num_prefill_tokens=64, context_per_token=4, block_size=8, num_blocks=32
    )
    simulation = started(setup, [24, 8])
    simulation.step()
    simulation.add(sequence(2, prompt(2, 40)))
    assert rows(simulation.schedule()) == [(0, 24, 1), (1, 8, 1), (2, 0, 22)]  # 32 - 2 rows - 32 / 4
    simulation.answer()
    simulation.add(sequence(3, prompt(3, 40)))
    longer = started(Setup(**{**vars(setup), "context_per_token": 1}), [24, 8])
    longer.step()
    longer.add(sequence(2, prompt(2, 40)))
    assert rows(longer.schedule()) == [(0, 24, 1), (1, 8, 1), (2, 0, 8)]
    longer.drain()


@pytest.mark.parametrize(
    ("free_context", "tokens_unit", "prompt_tokens"),
    [(32, 8, 30), (28, 1, 29), (28, 8, 22), (8, 8, 22), (4, 16, 14), (0, 64, 22)],
)
def test_some_context_is_free_and_what_is_left_of_a_step_is_whole_units(
    free_context: int, tokens_unit: int, prompt_tokens: int
) -> None:
    setup = Setup(
        max_num_batched_tokens=32,
        context_per_token=4,
        free_context=free_context,
        tokens_unit=tokens_unit,
        num_blocks=32,
    )
    simulation = started(setup, [24, 8])
    simulation.step()
    simulation.add(sequence(2, prompt(2, 40)))
    assert rows(simulation.schedule()) == [(0, 24, 1), (1, 8, 1), (2, 0, prompt_tokens)]
    simulation.answer()
    simulation.drain()
