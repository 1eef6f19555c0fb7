"""How often an engine may be started again before the process gives up. The clock is handed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

WINDOW_SECONDS: Final = 60.0


class RecoveryBudget:
    """At most ``max_recoveries`` within any 60 seconds."""

    def __init__(self, max_recoveries: int, clock: Callable[[], float]) -> None:
        self.max_recoveries = max_recoveries
        self._clock = clock
        self._taken: deque[float] = deque()

    def take(self) -> bool:
        """Use one up; False if there is none."""
        now = self._clock()
        while self._taken and now - self._taken[0] >= WINDOW_SECONDS:
            self._taken.popleft()
        if len(self._taken) >= self.max_recoveries:
            return False
        self._taken.append(now)
        return True
