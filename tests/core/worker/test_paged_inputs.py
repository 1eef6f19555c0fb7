"""What a decode step sends of its rows."""

from __future__ import annotations

import torch
from aphro_kernels.step_rows import IS_NEW

from aphro_core.messages.steps import NewSequence, RowsAgain, ScheduledSequence, StepPlan
from aphro_core.request import SamplingParams
from aphro_core.worker.paged_inputs import PagedInputs
from aphro_core.worker.sequences import SequenceState, apply_plan
from aphro_core.worker.step_memory import StepMemory
from aphro_core.worker.step_shapes import StepShapes


def test_a_row_is_new_in_its_first_step_alone() -> None:
    """In that step others may write the prefix that it reads, so that its keys are not read before."""
    shapes = StepShapes(4, 32, 192, lambda num_tokens: False)
    memory = StepMemory(max_rows=4, max_model_len=64, block_size=16, shapes=shapes, device=torch.device("cpu"))
    inputs = PagedInputs(memory, shapes)
    sequences: dict[int, SequenceState] = {}
    sent = memory._sent[:, IS_NEW]

    def new(seq_id: int) -> NewSequence:
        return NewSequence(seq_id, [1] * 17, 17, SamplingParams(), 0)

    def row(seq_id: int, start: int, blocks: list[int]) -> ScheduledSequence:
        return ScheduledSequence(seq_id, start, 1, [], blocks, True)

    for plan, expected in (
        (StepPlan(1, [row(7, 16, [0, 1])], [new(7)]), [1, 0, 0, 0]),
        (StepPlan(2, again=RowsAgain(1)), [0, 0, 0, 0]),
        (StepPlan(3, [row(7, 18, []), row(8, 16, [0, 2])], [new(8)]), [0, 1, 0, 0]),
        (StepPlan(4, [row(8, 17, []), row(7, 19, [])]), [0, 0, 0, 0]),
    ):
        apply_plan(plan, sequences)
        num_rows = inputs.stage(plan, sequences).num_rows
        assert sent.tolist() == expected
        memory.end_rows_(torch.zeros(num_rows, dtype=torch.int64))
