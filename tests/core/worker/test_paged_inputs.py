"""What a decode step sends of its rows, and what the device makes of them by itself."""

from __future__ import annotations

from unittest import mock

import torch
from aphro_kernels.step_rows import ANSWER, BLOCK, IS_NEW, POSITION, TOKEN, end_rows_
from hypothesis import given
from hypothesis import strategies as st

from aphro_core.messages.steps import NewSequence, RowsAgain, ScheduledSequence, StepPlan
from aphro_core.request import SamplingParams
from aphro_core.worker.answers import Answers
from aphro_core.worker.paged_inputs import PagedInputs
from aphro_core.worker.sequences import SequenceState, apply_plan
from aphro_core.worker.step_memory import StepMemory
from aphro_core.worker.step_shapes import StepShapes

CPU, MAX_ROWS = torch.device("cpu"), 4
SHAPES = StepShapes(MAX_ROWS, 32, 192, lambda num_tokens: False)


class Device:
    """Steps of the rows of one token, without layers: what was sent, and how often."""

    def __init__(self) -> None:
        self.answers = Answers(MAX_ROWS, CPU)
        sizes = {"max_rows": MAX_ROWS, "max_model_len": 64, "block_size": 16}
        self.memory = StepMemory(**sizes, shapes=SHAPES, device=CPU, answers=self.answers.memory)
        self.inputs = PagedInputs(self.memory, SHAPES)
        self.sequences: dict[int, SequenceState] = {}

    def launch(self, plan: StepPlan, tokens: list[int]) -> tuple[list[list[int]], int, list[int]]:
        """What the step reads, how often it was sent, and the tokens that the host gets."""
        apply_plan(plan, self.sequences)
        answer = self.answers.take()
        with mock.patch.object(self.memory, "send_rows", wraps=self.memory.send_rows) as sends:
            step = self.inputs.stage(plan, self.sequences, answer.place)
        read = self.memory._sent[: step.num_rows].tolist()
        end_rows_(self.memory.end(step.num_rows), torch.tensor(tokens))
        answer.expect(len(tokens))
        return read, sends.call_count, answer.read()


def new(seq_id: int) -> NewSequence:
    return NewSequence(seq_id, [1] * 17, 17, SamplingParams(), 0)


def row(seq_id: int, start: int, blocks: list[int]) -> ScheduledSequence:
    return ScheduledSequence(seq_id, start, 1, [], blocks, True)


def test_a_row_is_new_in_its_first_step_alone() -> None:
    """In that step others may write the prefix that it reads, so that its keys are not read before."""
    device = Device()
    for plan, expected in (
        (StepPlan(1, [row(7, 16, [0, 1])], [new(7)]), [1]),
        (StepPlan(2, again=RowsAgain(1)), [0]),
        (StepPlan(3, [row(7, 18, []), row(8, 16, [0, 2])], [new(8)]), [0, 1]),
        (StepPlan(4, [row(8, 17, []), row(7, 19, [])]), [0, 0]),
    ):
        read, _, _ = device.launch(plan, [5] * len(expected))
        assert [fields[IS_NEW] for fields in read] == expected


@given(st.lists(st.sets(st.integers(0, 2)), max_size=90))
def test_the_device_makes_of_its_rows_what_its_host_would_send(leavers: list[set[int]]) -> None:
    """Sent is only what it cannot know: who has left, and which block is begun."""
    device, ids, start = Device(), [7, 8, 9], 16
    plan = StepPlan(1, [row(seq_id, start, [0, seq_id]) for seq_id in ids], [new(seq_id) for seq_id in ids])
    device.launch(plan, [1, 2, 3])
    for step_id, leaving in enumerate(leavers, 2):
        without = sorted(index for index in leaving if index < len(ids) - 1)
        released = [ids[index] for index in without]
        ids = [seq_id for seq_id in ids if seq_id not in released]
        start += 1
        blocks = [(index, 20 + index) for index in range(len(ids))] if start % 16 == 0 else []
        again = RowsAgain(len(ids), without, blocks)
        read, num_sends, told = device.launch(StepPlan(step_id, released=released, again=again), ids)
        assert num_sends == bool(without or blocks)
        assert told == ids
        line = (step_id - 1) % 64 * MAX_ROWS
        for index, fields in enumerate(read):
            assert fields[POSITION] == start
            assert fields[TOKEN] == -1
            assert fields[BLOCK] == (20 + index if blocks else -1)
            assert fields[ANSWER] == line + index
