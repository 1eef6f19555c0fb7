"""Steps of no request: they prove that the whole group computes, and measure what a small step takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from aphro_core.messages.steps import NewSequence, ScheduledSequence, StepPlan
from aphro_core.request import SamplingParams

_SEQ_ID: Final = 0  # requests count from 1
_BLOCK_ID: Final = 0  # whoever is given it later writes it before reading


def trial_steps() -> Iterator[StepPlan]:
    """Two steps of one token each, the first one also warms up; then the sequence is released."""
    sampling = SamplingParams(temperature=0.0)
    new = NewSequence(seq_id=_SEQ_ID, token_ids=[0], num_prompt_tokens=1, sampling=sampling, seed=0)
    prefill = ScheduledSequence(_SEQ_ID, start=0, num_tokens=1, token_ids=[], new_block_ids=[_BLOCK_ID], samples=True)
    yield StepPlan(step_id=0, scheduled=[prefill], new=[new])
    decode = ScheduledSequence(_SEQ_ID, start=1, num_tokens=1, token_ids=[0], new_block_ids=[], samples=True)
    yield StepPlan(step_id=0, scheduled=[decode])
    yield StepPlan(step_id=0, scheduled=[], released=[_SEQ_ID])
