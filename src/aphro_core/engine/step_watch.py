"""How long a step may take: measured steps say what is usual, far beyond it is a hang. The clock is handed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

_FACTOR: Final = 8.0  # times the slowest comparable step: a busy host, a longer context
_FADE: Final = 0.99  # a step: what was slow once, at a start, does not count for ever


class StepWatch:
    """Knows the steps in flight, oldest first, and what earlier ones took by their number of tokens.

    A step has ``floor_seconds``, or 8 times what a step of its size is known to take. Sizes are powers of two; of a
    size that was never seen a smaller one says it, in proportion to the tokens. Before anything was measured a step
    has ``first_seconds``.
    """

    def __init__(self, floor_seconds: float, first_seconds: float, clock: Callable[[], float]) -> None:
        self._floor = floor_seconds
        self._first = max(first_seconds, floor_seconds)
        self._clock = clock
        self._in_flight: deque[tuple[float, int]] = deque()  # (since, tokens)
        self._slowest: dict[int, float] = {}  # by the bit length of the number of tokens; seconds
        self._last_answer = -float("inf")

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def submitted(self, num_tokens: int) -> None:
        self._in_flight.append((self._clock(), num_tokens))

    def answered(self) -> None:
        """The oldest step in flight has its answer."""
        now = self._clock()
        since, num_tokens = self._in_flight.popleft()
        size = num_tokens.bit_length()
        taken = now - max(since, self._last_answer)  # behind others in a pipeline it had to wait
        self._slowest[size] = max(taken, _FADE * self._slowest.get(size, 0.0))
        self._last_answer = now

    def forget(self) -> None:
        """What was measured so far says nothing: it was a warm-up."""
        self._slowest.clear()

    def overdue_seconds(self) -> float:
        """How far the oldest step is beyond its deadline; negative while it has time, or nothing is in flight."""
        if not self._in_flight:
            return -self._floor
        since, num_tokens = self._in_flight[0]
        return self._clock() - max(since, self._last_answer) - self.allowed_seconds(num_tokens)

    def allowed_seconds(self, num_tokens: int) -> float:
        """The deadline of a step of that size."""
        if not self._slowest:
            return self._first
        size = num_tokens.bit_length()
        known = max((seen for seen in self._slowest if seen <= size), default=min(self._slowest))
        expected = self._slowest[known] * float(2 ** max(size - known, 0))
        return max(self._floor, _FACTOR * expected)
