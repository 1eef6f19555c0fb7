"""Whether the ranks compute: what the kernel says of their processes tells a long step from one that stands still."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Final

from aphro_core.errors import EngineDeadError
from aphro_core.host import ProcessState, process_state
from aphro_core.messages.steps import WorkerLoaded

_STILL_SECONDS: Final = 1.0  # without an answer and without work: health says so half a second later
_WORK_SECONDS: Final = 0.02  # of processor time of any rank that count as work


class Progress:
    """Looks at the ranks of this host. The clock is handed in; seconds."""

    def __init__(self, ranks: Sequence[WorkerLoaded], clock: Callable[[], float]) -> None:
        here = socket.gethostname()
        self._ranks = [loaded for loaded in ranks if loaded.host == here]
        # a process that waits for its GPU may sleep: there only the step's deadline tells
        self._is_on_cpu = bool(ranks) and all(loaded.device == "cpu" for loaded in ranks)
        self._clock = clock
        self._last_work = clock()
        self._num_answered = 0
        self._cpu_seconds = 0.0

    def look(self, num_answered: int, *, is_in_flight: bool) -> str:
        """What keeps steps from advancing, empty if nothing does. Call it a few times a second."""
        now = self._clock()
        states = {loaded.rank: process_state(loaded.pid) for loaded in self._ranks}
        stopped = [str(rank) for rank, state in states.items() if _is_stopped(state)]
        cpu_seconds = sum(state.cpu_seconds for state in states.values() if state is not None)
        has_worked = num_answered != self._num_answered or cpu_seconds - self._cpu_seconds >= _WORK_SECONDS
        if has_worked or not is_in_flight or not self._is_on_cpu:
            self._last_work, self._num_answered, self._cpu_seconds = now, num_answered, cpu_seconds
        if stopped:
            return f"rank {', '.join(stopped)} is stopped"
        return "no rank computes" if now - self._last_work > _STILL_SECONDS else ""


def describe_hang(ranks: Sequence[WorkerLoaded], seconds: float) -> EngineDeadError:
    """The error for a step that has not ended within ``seconds``: what every rank was doing."""
    here = socket.gethostname()
    states = {loaded: process_state(loaded.pid) if loaded.host == here else None for loaded in ranks}
    stopped = [loaded for loaded, state in states.items() if _is_stopped(state)]
    named = stopped or list(ranks)
    where = ", ".join(f"rank {loaded.rank} on {loaded.host} (pid {loaded.pid})" for loaded in named)
    what = "is stopped (SIGSTOP)" if stopped else "hangs" if len(named) == 1 else "hang"
    return EngineDeadError(
        f"{where} {what}: a step has not ended within {seconds:.1f} s",
        hint="the stacks of its processes are above; --step-timeout gives steps more time",
        is_external=bool(stopped),
    )


def _is_stopped(state: ProcessState | None) -> bool:
    return state is not None and state.state in ("T", "t")
