"""No key takes everything: with several keys each has a bound, in the queue and in the engine, below the whole."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import anyio

_SHARE: Final = 0.75  # of queue and engine that one key may have; the rest waits for others


def share_of(whole: int, num_keys: int) -> int:
    """What one of ``num_keys`` keys may have at once. A single one, or nobody's, has everything."""
    return whole if num_keys < 2 else max(1, int(whole * _SHARE))


@dataclass
class _Key:
    num_taken: int = 0
    waiting: deque[tuple[int, anyio.Event]] = field(default_factory=deque)  # (places, set when they are taken)


class Shares:
    """Places in the engine, by key: who wants more than its share waits for its own requests to end, in order."""

    def __init__(self, max_places: int | None) -> None:
        """``max_places`` a key; None: as many as are asked for."""
        self._max_places = max_places or 2**62
        self._keys: dict[str, _Key] = {}

    @asynccontextmanager
    async def turn(self, key: str, num_places: int) -> AsyncIterator[None]:
        """Wait for ``num_places`` of the key's share (a request larger than all of it has it alone)."""
        places = min(num_places, self._max_places)
        entry = self._keys.setdefault(key, _Key())
        taken = anyio.Event()
        entry.waiting.append((places, taken))
        self._admit(entry)
        try:
            await taken.wait()
            yield
        finally:
            if taken.is_set():
                entry.num_taken -= places
            else:
                entry.waiting.remove((places, taken))
            self._admit(entry)
            if not entry.num_taken and not entry.waiting:
                self._keys.pop(key, None)

    def _admit(self, entry: _Key) -> None:
        while entry.waiting and entry.num_taken + entry.waiting[0][0] <= self._max_places:
            places, taken = entry.waiting.popleft()
            entry.num_taken += places
            taken.set()
