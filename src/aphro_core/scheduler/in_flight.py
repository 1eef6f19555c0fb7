"""The plans that the workers still have to answer, oldest first, and the check that an answer belongs to its plan."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from aphro_core.messages.steps import StepResult
from aphro_core.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sent:
    """A plan as far as its answer needs it: the sequences of its rows, in order, and which of the rows sample.

    ``is_plain``: every row samples, and no answer ends one by its length or is its first; ``stop_token_ids`` are then
    all that end one of them, and ``seq_ids`` theirs.
    """

    step_id: int
    sequences: list[Sequence]
    samples: list[bool]
    is_plain: bool = False
    seq_ids: list[int] | None = None
    stop_token_ids: frozenset[int] = frozenset()


class InFlight:
    """A queue of plans. Answers come in order."""

    def __init__(self) -> None:
        self._plans: deque[Sent] = deque()

    def __len__(self) -> int:
        return len(self._plans)

    def append(self, sent: Sent) -> None:
        self._plans.append(sent)

    def seq_ids(self, *, oldest_only: bool = False) -> list[int]:
        """The sequences of the oldest plan, or of all."""
        plans = list(self._plans)[:1] if oldest_only else self._plans
        return sorted({sequence.seq_id for sent in plans for sequence in sent.sequences})

    def answer(self, result: StepResult) -> Sent:
        """Take out the oldest plan. Raises ValueError, with nothing changed, for a result that is not of this plan."""
        if not self._plans:
            raise ValueError(f"a result of step {result.step_id}, and no step is in flight")
        sent = self._plans[0]
        if sent.step_id != result.step_id:
            raise ValueError(f"a result of step {result.step_id}, expected: of step {sent.step_id}")
        expected = len(sent.sequences) if sent.is_plain else sum(sent.samples)
        if len(result.token_ids) != expected:
            raise ValueError(f"step {sent.step_id} has {len(result.token_ids)} tokens, expected: {expected}")
        self._plans.popleft()
        if result.prompt_logprobs:
            _extend_prompt_logprobs(sent.sequences, result)
        return sent


def _extend_prompt_logprobs(sequences: list[Sequence], result: StepResult) -> None:
    by_id = {sequence.seq_id: sequence for sequence in sequences}
    for gained in result.prompt_logprobs:
        entries = by_id[gained.seq_id].prompt_logprobs
        if entries is not None:
            entries += gained.entries
