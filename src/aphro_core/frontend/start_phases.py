"""Where the seconds of an engine's start went, by what its ranks said on the way."""

from __future__ import annotations

from typing import Final

_BEFORE: Final = "processes"  # until the first rank speaks: imports, forks, the device
_BEHIND: Final = "first steps"
_SHOWN_SECONDS: Final = 0.05


class StartPhases:
    """Told of each rank's progress. A phase lasts until the last rank has said its last word of it."""

    def __init__(self, started_at: float) -> None:
        """Times in seconds, of any clock."""
        self._started_at = started_at
        self._ends = {_BEFORE: started_at}

    def take(self, phase: str, now: float) -> None:
        """A rank has got somewhere in this phase."""
        if len(self._ends) == 1:
            self._ends[_BEFORE] = now
        self._ends[phase] = now

    def describe(self, now: float) -> str:
        """``processes 3.1, weights 5.0, ...`` seconds of an engine that serves now; what took no time is left out. The
        figures add up to the whole."""
        begin, parts = self._started_at, []
        for phase, end in sorted({**self._ends, _BEHIND: now}.items(), key=lambda item: item[1]):
            if end - begin >= _SHOWN_SECONDS:
                parts.append((phase, end - begin))
                begin = end
        return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in parts)
