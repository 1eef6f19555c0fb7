"""How sequences come and go: what is refused, how they end, aborts, and going on behind earlier tokens."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from aphro_core.config import SchedulerConfig
from aphro_core.errors import RequestError
from aphro_core.messages.requests import SequenceOutput
from aphro_core.messages.steps import StepPlan, StepResult, TokenLogprobs
from aphro_core.scheduler.scheduler import Scheduler
from tests.core.scheduler.fake_worker import run_alone
from tests.core.scheduler.simulation import Setup, Simulation, outputs_of, sequence


def answer(plan: StepPlan | None, *token_ids: int) -> StepResult:
    assert plan is not None
    assert len(token_ids) == sum(row.samples for row in plan.scheduled)
    return StepResult(plan.step_id, list(token_ids))


def update(scheduler: Scheduler, result: StepResult) -> list[SequenceOutput]:
    gains = scheduler.update(result)
    return outputs_of(gains, [*(output.seq_id for output in gains.outputs), *gains.seq_ids])


def run(scheduler: Scheduler, token_ids: list[int]) -> list[SequenceOutput]:
    """Draw these tokens, one a step, for the only sequence there is."""
    return [output for token_id in token_ids for output in update(scheduler, answer(scheduler.schedule(), token_id))]


@pytest.mark.parametrize(
    "field", ["max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_in_flight", "num_blocks", "block_size"]
)
def test_every_size_starts_at_one(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Setup(**{field: 0}).scheduler()


# --- what is refused ---


@pytest.mark.parametrize("num_tokens", [0, 64, 65])
def test_a_prompt_must_leave_room_for_one_token(num_tokens: int) -> None:
    scheduler = Setup(max_model_len=64).scheduler()
    with pytest.raises(RequestError, match=rf"has {num_tokens} tokens, allowed: 1 to 63") as caught:
        scheduler.add(sequence(1, [7] * num_tokens))
    assert caught.value.field == "prompt"
    assert not scheduler.has_work
    scheduler.add(sequence(1, [7] * 63))


def test_a_sequence_that_can_never_fit_is_refused_and_the_longest_that_can_runs_to_its_end() -> None:
    simulation = Simulation(Setup(num_blocks=3, block_size=4))
    with pytest.raises(
        RequestError, match=r"make 14 tokens, allowed: up to 13 \(the cache has 3 blocks of 4"
    ) as caught:
        simulation.add(sequence(1, [7] * 5, max_tokens=9))
    assert caught.value.field == "max_tokens"
    assert not simulation.scheduler.has_work
    simulation.add(sequence(1, [7] * 5, max_tokens=8))  # 13 tokens, the last of which is not fed back
    simulation.drain()
    assert len(simulation.clients[1].token_ids) == 8


def test_max_model_len_bounds_what_a_sequence_may_need() -> None:
    scheduler = Setup(num_blocks=4, block_size=4, max_model_len=16).scheduler()
    scheduler.add(sequence(1, [7] * 5, max_tokens=1000))
    assert scheduler.has_work


def test_a_live_id_may_not_come_twice_but_may_come_again() -> None:
    scheduler = Setup().scheduler()
    scheduler.add(sequence(1, [7]))
    with pytest.raises(ValueError, match="sequence 1 is already here"):
        scheduler.add(sequence(1, [8]))
    scheduler.abort([1])
    scheduler.add(sequence(1, [8]))


# --- how a sequence ends ---


def test_a_stop_token_is_the_last_token_of_the_output() -> None:
    scheduler = Setup().scheduler()
    scheduler.add(sequence(1, [5, 9, 5], stop=(9, 10)))
    assert run(scheduler, [5, 9]) == [SequenceOutput(1, [5]), SequenceOutput(1, [9], None, "stop", 9)]
    assert not scheduler.has_work
    assert scheduler.stats().num_blocks_used == 0


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    scheduler = Setup().scheduler()
    assert scheduler.add(sequence(1, [5, 9], stop=(9,))) is None
    assert scheduler.has_work


@pytest.mark.parametrize(("max_tokens", "max_model_len", "num_outputs"), [(3, 64, 3), (1, 64, 1), (50, 8, 5)])
def test_max_tokens_and_max_model_len_end_with_length(max_tokens: int, max_model_len: int, num_outputs: int) -> None:
    scheduler = Setup(max_model_len=max_model_len).scheduler()
    scheduler.add(sequence(1, [5, 6, 7], max_tokens=max_tokens))
    outputs = run(scheduler, list(range(num_outputs)))
    assert [output.finish_reason for output in outputs] == [None] * (num_outputs - 1) + ["length"]
    assert outputs[-1].stop_token_id is None
    assert not scheduler.has_work


def test_a_stop_token_at_the_limit_is_a_stop() -> None:
    scheduler = Setup().scheduler()
    scheduler.add(sequence(1, [5], max_tokens=1, stop=(9,)))
    assert run(scheduler, [9]) == [SequenceOutput(1, [9], None, "stop", 9)]


def test_what_is_finished_is_released_with_the_next_plan_and_makes_none_of_its_own() -> None:
    scheduler = Setup().scheduler()
    scheduler.add(sequence(1, [5], max_tokens=1))
    run(scheduler, [7])
    assert scheduler.schedule() is None
    scheduler.add(sequence(2, [5], max_tokens=1))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.released == [1]
    scheduler.update(answer(plan, 7))
    scheduler.add(sequence(3, [5], max_tokens=1))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.released == [2]


# --- answers ---


def test_logprobs_are_passed_on() -> None:
    scheduler = Setup().scheduler()
    scheduler.add(sequence(1, [5]))
    plan = scheduler.schedule()
    assert plan is not None
    logprobs = TokenLogprobs([7, 8], [-0.5, -1.5], 1)
    (output,) = update(scheduler, StepResult(plan.step_id, [7], {0: logprobs}))
    assert output.logprobs == [logprobs]


def test_an_answer_that_does_not_belong_to_its_plan_changes_nothing() -> None:
    scheduler = Setup().scheduler()
    with pytest.raises(ValueError, match="no step is in flight"):
        scheduler.update(StepResult(1, []))
    scheduler.add(sequence(1, [5]))
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="a result of step 2, expected: of step 1"):
        scheduler.update(StepResult(2, [7]))
    with pytest.raises(ValueError, match="step 1 has 0 tokens, expected: 1"):
        scheduler.update(StepResult(1, []))
    with pytest.raises(ValueError, match="step 1 has 2 tokens, expected: 1"):
        scheduler.update(StepResult(1, [7, 7]))
    assert update(scheduler, answer(plan, 7)) == [SequenceOutput(1, [7])]


def test_a_plan_shares_no_list_with_the_scheduler() -> None:
    """In one process the worker is handed the very objects, and extends them as it likes."""
    simulation = Simulation(Setup())
    simulation.add(sequence(1, [5, 6, 7, 8, 9]))
    simulation.add(sequence(2, [5, 6, 7, 8, 9]))
    while simulation.scheduler.has_work:
        plan = simulation.schedule()
        assert plan is not None
        for new in plan.new:
            new.token_ids.append(-1)
        for row in plan.scheduled:
            row.new_block_ids.append(-1)
            row.token_ids.append(-1)
        plan.released.append(-1)
        simulation.answer()
    simulation.drain()


# --- aborts ---


def test_unknown_ids_are_ignored() -> None:
    scheduler = Setup().scheduler()
    scheduler.add(sequence(1, [5], max_tokens=1))
    scheduler.abort([3, 4])
    run(scheduler, [7])
    scheduler.abort([1])
    assert not scheduler.has_work


def test_an_abort_while_waiting_leaves_no_trace_at_the_workers() -> None:
    scheduler = Setup().scheduler()
    scheduler.add(sequence(1, [5]))
    scheduler.abort([1])
    assert not scheduler.has_work
    scheduler.add(sequence(2, [5]))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.released == []


def test_an_abort_between_steps_frees_its_blocks_at_once() -> None:
    scheduler = Setup().scheduler()
    scheduler.add(sequence(1, [5]))
    run(scheduler, [7])
    scheduler.abort([1])
    assert scheduler.stats().num_blocks_used == 0
    assert not scheduler.has_work


def test_an_abort_in_flight_keeps_blocks_and_place_until_the_answer_and_gives_no_output() -> None:
    scheduler = Setup(max_num_seqs=1, max_in_flight=2).scheduler()
    scheduler.add(sequence(1, [5, 6]))
    plan = scheduler.schedule()
    scheduler.abort([1])
    scheduler.add(sequence(2, [5]))
    assert scheduler.has_work
    assert scheduler.stats().num_blocks_used == 1
    assert scheduler.schedule() is None, "the workers have state for one sequence only"
    assert update(scheduler, answer(plan, 7)) == []
    assert scheduler.stats().num_blocks_used == 0
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.released, [new.seq_id for new in plan.new]) == ([1], [2])


def test_an_id_that_comes_back_while_its_old_sequence_is_in_flight_waits_for_it() -> None:
    scheduler = Setup(max_in_flight=2).scheduler()
    scheduler.add(sequence(1, [5, 6]))
    plan = scheduler.schedule()
    scheduler.abort([1])
    scheduler.add(sequence(1, [8, 9]))
    assert scheduler.schedule() is None
    assert update(scheduler, answer(plan, 7)) == []
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.released == [1]
    assert [new.token_ids for new in plan.new] == [[8, 9]]
    assert update(scheduler, answer(plan, 3)) == [SequenceOutput(1, [3])]


def test_an_abort_of_the_stuck_head_lets_the_next_one_start() -> None:
    scheduler = Setup(num_blocks=4, block_size=4).scheduler()
    scheduler.add(sequence(1, [5], max_tokens=4))
    scheduler.add(sequence(2, [5] * 13, max_tokens=2))  # four blocks
    scheduler.add(sequence(3, [5], max_tokens=2))
    run(scheduler, [7])
    scheduler.abort([2])
    plan = scheduler.schedule()
    assert plan is not None
    assert [row.seq_id for row in plan.scheduled] == [1, 3]


# --- going on behind earlier tokens ---


def test_a_resumed_sequence_computes_prompt_and_output_and_draws_the_next_token() -> None:
    scheduler = Setup(max_num_batched_tokens=4).scheduler()
    scheduler.add(sequence(1, [5, 6, 7], outputs=(8, 9), max_tokens=4))
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.new[0].token_ids, plan.new[0].num_prompt_tokens) == ([5, 6, 7, 8, 9], 3)
    assert [row.samples for row in plan.scheduled] == [False]
    assert update(scheduler, answer(plan)) == []
    assert run(scheduler, [1, 2]) == [SequenceOutput(1, [1]), SequenceOutput(1, [2], None, "length")]


def test_resuming_at_any_token_gives_the_rest() -> None:
    setup = Setup(vocab_size=20)
    add = sequence(1, [5, 6, 7], max_tokens=12, stop=(3,))
    whole, reason, _ = run_alone(add, setup.vocab_size, setup.max_model_len)
    for length in range(len(whole)):
        simulation = Simulation(setup)
        simulation.add(replace(add, output_token_ids=whole[:length]))
        simulation.drain()
        assert simulation.clients[1].token_ids == whole
        assert simulation.clients[1].outputs[-1].finish_reason == reason


@pytest.mark.parametrize(
    ("outputs", "max_tokens", "max_model_len", "expected"),
    [
        ((8, 9), 2, 64, SequenceOutput(1, [], finish_reason="length")),
        ((8, 9), 50, 5, SequenceOutput(1, [], finish_reason="length")),
        ((8, 3), 50, 64, SequenceOutput(1, [], finish_reason="stop", stop_token_id=3)),
    ],
)
def test_a_resumed_sequence_that_has_everything_is_answered_at_once(
    outputs: tuple[int, ...], max_tokens: int, max_model_len: int, expected: SequenceOutput
) -> None:
    scheduler = Setup(max_model_len=max_model_len).scheduler()
    assert scheduler.add(sequence(1, [5, 6, 7], outputs=outputs, max_tokens=max_tokens, stop=(3,))) == expected
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_stats_count_what_is_there() -> None:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8), num_blocks=8, block_size=4, max_model_len=32
    )
    scheduler.add(sequence(1, [5] * 5))
    scheduler.add(sequence(2, [5] * 5))
    before = scheduler.stats()
    assert (before.step, before.num_running, before.num_waiting, before.num_blocks_used) == (0, 0, 2, 0)
    plan = scheduler.schedule()
    assert scheduler.num_in_flight == 1
    scheduler.update(answer(plan, 7))
    after = scheduler.stats()
    assert (after.step, after.num_running, after.num_waiting, after.num_blocks_used) == (1, 1, 1, 2)
    assert (after.num_prefix_queries, after.num_prefix_hits, scheduler.num_in_flight) == (5, 0, 0)
