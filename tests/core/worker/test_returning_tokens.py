"""Tokens on their way back to the first stage: in order, in their places before they are read, and asked for late."""

from __future__ import annotations

from collections import deque
from typing import Any, cast
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aphro_core.distributed.stage_links import MOST_DUE
from aphro_core.messages.steps import ScheduledSequence, StepPlan
from aphro_core.worker.returning_tokens import ReturningTokens

SLOTS = 6


class Line:
    """The link, and the last stage at its other end, which has drawn as soon as anybody asks."""

    def __init__(self) -> None:
        self.has_passed = False
        self.sent: deque[Tensor] = deque()

    def receive(self, count: int, device: torch.device) -> Tensor:
        tokens = self.sent.popleft()
        assert (len(tokens), tokens.device) == (count, device)
        return tokens


class Row:
    def __init__(self) -> None:
        self.token_ids = [7]


class State:
    def __init__(self) -> None:
        self.row = Row()


def plan_of(seq_ids: list[int], sequences: dict[int, State], ahead: set[int]) -> StepPlan:
    """A row of each, which reads a token that only the device has if it is ``ahead``."""
    starts = {seq_id: len(sequences[seq_id].row.token_ids) - (seq_id not in ahead) for seq_id in seq_ids}
    return StepPlan(1, [ScheduledSequence(seq_id, start, 1, [], [], True) for seq_id, start in starts.items()])


@given(st.lists(st.tuples(st.sets(st.integers(0, SLOTS - 2), min_size=1), st.booleans(), st.booleans()), max_size=40))
def test_tokens_are_in_place_before_they_are_read(steps: list[tuple[set[int], bool, bool]]) -> None:
    """Sequence i has slot i. Of each step: its rows, whether they are on the device alone, whether it fails here."""
    line, last = Line(), torch.zeros(SLOTS, dtype=torch.int64)
    returning = ReturningTokens(cast(Any, line), last, 2)
    sequences = {seq_id: State() for seq_id in range(SLOTS)}
    drawn: dict[int, int] = {}
    for number, (rows, reads_device, fails) in enumerate(steps, 1):
        seq_ids = sorted(rows)
        ahead = rows & drawn.keys() if reads_device else set()
        before = len(line.sent)
        returning.take_for(plan_of(seq_ids, sequences, ahead), cast(Any, sequences))
        assert all(last[seq_id] == drawn[seq_id] for seq_id in ahead)
        assert ahead or len(line.sent) >= min(before, MOST_DUE - 1)  # nobody needs one: none is asked for
        line.has_passed = False
        line.sent.append(torch.tensor([100 * number + seq_id for seq_id in seq_ids]))
        if fails:
            returning.expect_void(len(seq_ids))
        else:
            returning.expect(seq_ids, torch.tensor(seq_ids))
            drawn |= {seq_id: 100 * number + seq_id for seq_id in seq_ids}
        assert line.has_passed
        assert 0 < len(line.sent) <= MOST_DUE
    returning.forget_all()
    assert not line.sent


def test_tokens_that_found_no_memory_are_still_to_come() -> None:
    """Else each step behind them would read those of the step before it."""
    line, last = Line(), torch.zeros(SLOTS, dtype=torch.int64)
    returning = ReturningTokens(cast(Any, line), last, 2)
    sequences = {seq_id: State() for seq_id in range(SLOTS)}
    for token in (5, 6):
        line.sent.append(torch.tensor([token]))
        returning.expect([token - 5], torch.tensor([token - 5]))
    with mock.patch.object(line, "receive", side_effect=torch.OutOfMemoryError), pytest.raises(torch.OutOfMemoryError):
        returning.take_for(plan_of([0], sequences, {0}), cast(Any, sequences))
    returning.forget_all()
    assert not line.sent
    assert last[:2].tolist() == [5, 6]


@pytest.mark.parametrize("num_stages", [2, 7, 8, 12])
def test_no_step_waits_for_tokens_of_steps_that_fill_the_stages(num_stages: int) -> None:
    """One row a stage, each of which reads the token that it drew when all other stages had theirs."""
    line, last = Line(), torch.zeros(num_stages + 1, dtype=torch.int64)
    returning = ReturningTokens(cast(Any, line), last, num_stages)
    sequences = {seq_id: State() for seq_id in range(num_stages)}
    for step in range(3 * num_stages):
        seq_id = step % num_stages
        ahead = {seq_id} if step >= num_stages else set()
        returning.take_for(plan_of([seq_id], sequences, ahead), cast(Any, sequences))
        assert len(line.sent) == min(step, num_stages - 1)
        assert not ahead or last[seq_id] == step - num_stages
        line.sent.append(torch.tensor([step]))
        returning.expect([seq_id], torch.tensor([seq_id]))


def test_a_step_that_has_told_its_tokens_is_no_void_one() -> None:
    line = Line()
    returning = ReturningTokens(cast(Any, line), torch.zeros(SLOTS, dtype=torch.int64), 2)
    returning.expect([1], torch.tensor([1]))
    returning.expect_void(1)
    line.sent.append(torch.tensor([5]))
    returning.forget_all()
    assert not line.sent
