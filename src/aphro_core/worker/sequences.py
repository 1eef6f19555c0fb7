"""What a rank keeps of each sequence, and how a plan changes it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from aphro_core.messages.steps import StepPlan
from aphro_core.worker.sampler import SamplingRow


@dataclass(slots=True)
class SequenceState:
    """A sequence as a rank knows it.

    ``row.token_ids`` is the prompt and every output token that the rank was told of: with plans that run ahead fewer
    than there are, since those drawn last are on the device only.
    """

    row: SamplingRow
    block_table: array[int] = field(default_factory=lambda: array("q"))


def apply_plan(plan: StepPlan, sequences: dict[int, SequenceState]) -> None:
    """Forget what is released, learn what is new, extend what is scheduled: in this order.

    Of rows that come again (``plan.again``) nothing is noted but their blocks, by whoever keeps their order.
    """
    if plan.forgets_all:
        sequences.clear()
    for seq_id in plan.released:
        sequences.pop(seq_id, None)
    for new in plan.new:
        row = SamplingRow(
            seq_id=new.seq_id,
            sampling=new.sampling,
            seed=new.seed,
            position=len(new.token_ids),
            token_ids=list(new.token_ids),
            num_prompt_tokens=new.num_prompt_tokens,
            stop_token_ids=new.stop_token_ids,
        )
        sequences[new.seq_id] = SequenceState(row)
    for entry in plan.scheduled:
        state = sequences[entry.seq_id]
        if entry.token_ids:
            state.row.token_ids += entry.token_ids
        state.row.position = entry.start + entry.num_tokens
        if entry.new_block_ids:
            state.block_table.extend(entry.new_block_ids)
