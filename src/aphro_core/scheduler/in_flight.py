"""The plans that the workers still have to answer, oldest first, and the check that an answer belongs to its plan."""

from __future__ import annotations

from collections import deque

from aphro_core.messages.steps import SampledToken, StepPlan, StepResult
from aphro_core.scheduler.sequence import Sequence


class InFlight:
    """A queue of plans with their sequences. Answers come in order."""

    def __init__(self) -> None:
        self._plans: deque[tuple[StepPlan, list[Sequence]]] = deque()

    def __len__(self) -> int:
        return len(self._plans)

    def append(self, plan: StepPlan, sequences: list[Sequence]) -> None:
        """Add a plan that goes out now; ``sequences`` are those of its rows, in their order."""
        self._plans.append((plan, sequences))

    def answer(self, result: StepResult) -> list[tuple[Sequence, SampledToken | None]]:
        """Take out the oldest plan: its sequences in order, each with its token if its row samples.

        They have one plan less in flight, and have got their prompt logprobs. Raises ValueError, with nothing changed,
        for a result that is not of this plan.
        """
        if not self._plans:
            raise ValueError(f"a result of step {result.step_id}, and no step is in flight")
        plan, sequences = self._plans[0]
        _check(plan, result)
        self._plans.popleft()
        if result.prompt_logprobs:
            _extend_prompt_logprobs(sequences, result)
        answered: list[tuple[Sequence, SampledToken | None]] = []
        drawn = iter(result.sampled)  # in the plan's order, as was checked
        for sequence, row in zip(sequences, plan.scheduled, strict=True):
            sequence.num_in_flight -= 1
            if row.samples:
                sequence.num_unread -= 1
                answered.append((sequence, next(drawn)))
            else:
                answered.append((sequence, None))
        return answered


def _check(plan: StepPlan, result: StepResult) -> None:
    if plan.step_id != result.step_id:
        raise ValueError(f"a result of step {result.step_id}, expected: of step {plan.step_id}")
    expected = [row.seq_id for row in plan.scheduled if row.samples]
    sampled = [token.seq_id for token in result.sampled]
    if sampled != expected:
        raise ValueError(f"step {plan.step_id} has tokens of sequences {sampled}, expected: of {expected}")


def _extend_prompt_logprobs(sequences: list[Sequence], result: StepResult) -> None:
    by_id = {sequence.seq_id: sequence for sequence in sequences}
    for gained in result.prompt_logprobs:
        entries = by_id[gained.seq_id].prompt_logprobs
        if entries is not None:
            entries += gained.entries
