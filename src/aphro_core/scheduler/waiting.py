"""The sequences that wait for a place: first those that were preempted, then those that never ran, oldest first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from operator import attrgetter

from aphro_core.scheduler.sequence import Sequence

by_arrival = attrgetter("arrival")


class WaitingQueue:
    """A queue in order of arrival from which anybody may leave.

    Only its head may start, so whatever runs, and thus whatever is preempted, is older than all that never ran: two
    queues, one behind the other, keep the order. ``num_tokens`` counts the known tokens of all who wait.
    """

    def __init__(self) -> None:
        self._preempted: list[Sequence] = []
        self._never_ran: OrderedDict[int, Sequence] = OrderedDict()  # a plain dict is slow at losing its first item
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._preempted) + len(self._never_ran)

    @property
    def head(self) -> Sequence | None:
        """The oldest."""
        return self._preempted[0] if self._preempted else next(iter(self._never_ran.values()), None)

    def append(self, sequence: Sequence) -> None:
        """Queue a sequence that has just arrived."""
        self._never_ran[sequence.seq_id] = sequence
        self.num_tokens += len(sequence.token_ids)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that has run, at its old place in the order."""
        insort(self._preempted, sequence, key=by_arrival)
        self.num_tokens += len(sequence.token_ids)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that waits, wherever it is."""
        if self._never_ran.pop(sequence.seq_id, None) is None:
            del self._preempted[bisect_left(self._preempted, sequence.arrival, key=by_arrival)]
        self.num_tokens -= len(sequence.token_ids)
