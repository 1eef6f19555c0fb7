"""Whether the API process hangs: a loop that is silent, and a kernel that says what the process does meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from aphro_core.host import ProcessState

BEAT_SECONDS: Final = 0.25
STILL_SECONDS: Final = 1.5  # silent, and without a moment of work: stopped, or waiting for what never comes
BUSY_SECONDS: Final = 10.0  # silent, and computing: a loop without end
_WORK_STATES: Final = "RDt"  # wants a core, waits for a disk, is held by a debugger


class Heartbeat:
    """Call ``look`` several times a second. The clock is handed in, seconds; ``state`` is what the kernel says."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._beat_at = self._work_at = self._looked_at = clock()
        self._cpu_seconds = 0.0

    def look(self, num_beats: int, state: ProcessState | None) -> str:
        """Why it counts as hanging, empty while it does not."""
        now = self._clock()
        was_away = now - self._looked_at > STILL_SECONDS / 2  # who looks was stopped itself, or starved
        self._looked_at = now
        if num_beats or was_away or state is None:
            self._beat_at = self._work_at = now
        elif state.state in _WORK_STATES or state.cpu_seconds != self._cpu_seconds:
            self._work_at = now
        self._cpu_seconds = state.cpu_seconds if state is not None else 0.0
        if now - self._beat_at > BUSY_SECONDS:
            return f"hangs: it computes, and its loop has not run for {now - self._beat_at:.1f} s"
        if now - self._work_at > STILL_SECONDS:
            is_stopped = state is not None and state.state == "T"
            what = "is stopped (SIGSTOP)" if is_stopped else "hangs"
            return f"{what}: silent for {now - self._beat_at:.1f} s"
        return ""
