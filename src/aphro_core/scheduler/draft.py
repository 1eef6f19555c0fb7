"""A step plan in the making: its rows, and what is left of its token budget."""

from __future__ import annotations

from aphro_core.messages.steps import NewSequence, ScheduledSequence, StepPlan
from aphro_core.scheduler.sequence import Sequence


class Draft:
    """Collects the rows of one plan. ``tokens_left`` never falls below 0: the caller asks for no more."""

    __slots__ = ("new", "num_prefill_tokens", "scheduled", "sequences", "tokens_left")

    def __init__(self, max_num_tokens: int) -> None:
        self.scheduled: list[ScheduledSequence] = []
        self.sequences: list[Sequence] = []  # of ``scheduled``, in its order
        self.new: list[NewSequence] = []
        self.tokens_left = max_num_tokens
        self.num_prefill_tokens = 0

    def place_prefill(self, sequence: Sequence, new_block_ids: list[int]) -> None:
        """A row of all its pending tokens, or of as many as the budget has left."""
        num_tokens = min(sequence.num_pending, self.tokens_left)
        self.num_prefill_tokens += num_tokens
        self.place(sequence, num_tokens, new_block_ids)

    def place_decode(self, sequence: Sequence, new_block_ids: list[int]) -> None:
        """A row of the one token that it has pending: what :meth:`place` does, for most rows of most steps."""
        start, token_ids = sequence.num_computed, sequence.token_ids[sequence.num_sent :]
        sequence.num_sent += len(token_ids)
        self.scheduled.append(ScheduledSequence(sequence.seq_id, start, 1, token_ids, new_block_ids, True))
        self.sequences.append(sequence)
        self.tokens_left -= 1
        sequence.num_computed = start + 1
        sequence.num_in_flight += 1
        sequence.num_unread += 1

    def place(self, sequence: Sequence, num_tokens: int, new_block_ids: list[int]) -> None:
        """A row of its next ``num_tokens`` tokens, which count as computed from now on."""
        start = sequence.num_computed
        stop = start + num_tokens
        samples = stop == len(sequence.token_ids) + sequence.num_unread
        token_ids = sequence.token_ids[sequence.num_sent :]
        sequence.num_sent += len(token_ids)
        row = ScheduledSequence(sequence.seq_id, start, num_tokens, token_ids, new_block_ids, samples)
        self.scheduled.append(row)
        self.sequences.append(sequence)
        self.tokens_left -= num_tokens
        sequence.num_computed = stop
        sequence.num_in_flight += 1
        sequence.num_unread += samples

    def finish(self, step_id: int, released: list[int]) -> StepPlan:
        return StepPlan(step_id, self.scheduled, self.new, released)
