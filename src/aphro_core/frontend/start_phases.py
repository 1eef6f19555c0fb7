"""Where the seconds of a start went, by what its ranks said on the way."""

from __future__ import annotations

from typing import Final

_COMMAND: Final = "command"  # until the engine is asked for
_PROCESSES: Final = "processes"  # until the first rank speaks: imports, forks
_TRIAL: Final = "first steps"
_BEHIND: Final = "serving"
_SHOWN_SECONDS: Final = 0.05


class StartPhases:
    """Told of each rank's progress. A phase lasts until the last rank has said its last word of it."""

    def __init__(self, began_at: float, started_at: float) -> None:
        """When the command began, and when the engine was asked for. Times in seconds, of any clock."""
        self.began_at = began_at
        self._ends = {_COMMAND: started_at}

    @property
    def has_ranks(self) -> bool:
        """Whether one has spoken."""
        return _PROCESSES in self._ends

    def take(self, phase: str, now: float) -> None:
        """A rank has got somewhere in this phase."""
        self._ends.setdefault(_PROCESSES, now)
        self._ends[phase] = now

    def take_ready(self, now: float) -> None:
        """The engine is ready."""
        self.take(_TRIAL, now)

    def describe(self, now: float) -> str:
        """``command 0.5, processes 3.1, weights 5.0, ...`` seconds of what serves now; what took no time is left out.
        The figures add up to the whole."""
        begin, parts = self.began_at, []
        for phase, end in sorted({**self._ends, _BEHIND: now}.items(), key=lambda item: item[1]):
            if end - begin >= _SHOWN_SECONDS:
                parts.append((phase, end - begin))
                begin = end
        return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in parts)
