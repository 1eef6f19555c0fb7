"""Sequences that decode in step: each plan is the one before once more, and nothing is decided for a single row."""

from __future__ import annotations

from bisect import bisect_left

from aphro_core.scheduler.sequence import Sequence
from aphro_core.scheduler.waiting import by_arrival


class Cohort:
    """The rows of a plan, oldest first, all of which decode; they leave as they end, and none joins.

    ``rows`` and ``seq_ids`` are new lists when one has left: plans in flight keep theirs.
    """

    __slots__ = ("_left", "num_until_full", "rows", "seq_ids", "stop_token_ids")

    def __init__(self, rows: list[Sequence]) -> None:
        self.rows = rows
        self.seq_ids = [sequence.seq_id for sequence in rows]
        self.stop_token_ids = frozenset[int]().union(*(sequence.stop_token_ids for sequence in rows))
        self._left: set[int] = set()  # indexes into ``rows``
        self._part_with_full()

    def leave(self, sequence: Sequence) -> None:
        """It has no row in the plans that follow. Nothing is done if it is none of these."""
        index = bisect_left(self.rows, sequence.arrival, key=by_arrival)
        if index < len(self.rows) and self.rows[index] is sequence:
            self._left.add(index)

    def take_leavers(self) -> list[int]:
        """The indexes, rising, among the rows so far of those that have left; the rows are those that stay."""
        left = sorted(self._left)
        if left:
            self.rows, self.seq_ids = self.rows.copy(), self.seq_ids.copy()
            for index in reversed(left):
                del self.rows[index], self.seq_ids[index]
            self._left.clear()
        return left

    def advance(self) -> bool:
        """A row more of each is in flight. Whether none of them draws its sequence's last token."""
        for sequence in self.rows:
            sequence.num_computed += 1
            sequence.num_in_flight += 1
            sequence.num_unread += 1
        self.num_until_full -= 1
        if self.num_until_full:
            return True
        self._part_with_full()
        return False

    def _part_with_full(self) -> None:
        """Of whom the last token is drawn by a plan in flight, no row follows."""
        nums = [one.max_len - len(one.token_ids) - one.num_unread for one in self.rows]
        self._left.update(index for index, num in enumerate(nums) if num <= 0)
        self.num_until_full = min((num for num in nums if num > 0), default=-1)
