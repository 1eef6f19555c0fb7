"""Stop strings, found in a text that arrives in parts: each character is looked at once, wherever the parts are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopString:
    """A string, and for each of its prefixes the longest proper prefix that also ends it (Knuth, Morris, Pratt)."""

    text: str
    fallback: tuple[int, ...]

    @classmethod
    def of(cls, text: str) -> StopString:
        fallback, matched = [0], 0
        for char in text[1:]:
            while matched and text[matched] != char:
                matched = fallback[matched - 1]
            matched += text[matched] == char
            fallback.append(matched)
        return cls(text, tuple(fallback))

    def feed(self, part: str, matched: int) -> tuple[int | None, int]:
        """(where in ``part`` the string first ends, or None; how much of the string the text read so far ends with).

        ``matched`` is that second value of the part before, 0 at the start.
        """
        text, length = self.text, len(self.text)
        start = 0 if matched else part.find(text[0])
        if start < 0:
            return None, 0
        for at in range(start, len(part)):
            char = part[at]
            while matched and (matched == length or text[matched] != char):
                matched = self.fallback[matched - 1]
            if text[matched] == char:
                matched += 1
                if matched == length:
                    return at + 1, matched
        return None, matched


class StopFinder:
    """Looks for several strings in one text. The one that ends first is found, the longest if they end together."""

    __slots__ = ("_matched", "_stops")

    def __init__(self, stops: Sequence[StopString]) -> None:
        self._stops = stops
        self._matched = [0] * len(stops)

    @property
    def num_held(self) -> int:
        """Characters at the end of the text that may turn out to be the start of a stop string."""
        return max(self._matched)

    def find(self, part: str) -> tuple[int, str] | None:
        """(where in ``part`` it ends, which string) of the first to end there. Nothing may follow once it is found."""
        best: tuple[int, str] | None = None
        for at, stop in enumerate(self._stops):
            end, self._matched[at] = stop.feed(part, self._matched[at])
            if end is not None and (best is None or (end, -len(stop.text)) < (best[0], -len(best[1]))):
                best = end, stop.text
        return best

    def skip(self, part: str) -> None:
        """Read a part in which no stop string may end; one may begin there and end later."""
        for at, stop in enumerate(self._stops):
            end: int | None = 0
            rest = part
            while end is not None:
                end, self._matched[at] = stop.feed(rest, self._matched[at])
                rest = rest[end:]
            # a whole match is spent: what is left of it is its longest end that may still be a start
            if self._matched[at] == len(stop.text):
                self._matched[at] = stop.fallback[-1]
