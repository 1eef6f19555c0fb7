"""Counts the open requests: refuses more than the queue holds, refuses all when draining, ends what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio

from aphro_core.errors import OverloadedError
from aphro_core.server.shares import share_of

_RETRY_SECONDS: Final = 2


class Gate:
    """Where every request that will use the engine passes, before its body is parsed."""

    def __init__(self, max_open: int, num_keys: int = 0) -> None:
        self._max_open = max_open
        self._share = share_of(max_open, num_keys)
        self._by_key: Counter[str] = Counter()
        self._open: set[anyio.CancelScope] = set()
        self._idle = anyio.Event()
        self._closed = False

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def num_open(self) -> int:
        return len(self._open)

    @contextmanager
    def admit(self, key: str = "") -> Iterator[anyio.CancelScope]:
        """Hold a place in the block; do the request's work within the scope: cancelled means "stop now, and say so".

        Raises OverloadedError: draining, ``max_open`` requests are open, or the key has its share of them.
        """
        if self._closed:
            raise shutting_down()
        if len(self._open) >= self._max_open:
            message = f"{self._max_open} requests are open already, which is what this server queues; try again"
            raise OverloadedError(message, retry_after=_RETRY_SECONDS)
        if self._by_key[key] >= self._share:
            message = f"{self._share} requests with this key are open already, which is its share; try again"
            raise OverloadedError(message, retry_after=_RETRY_SECONDS)
        work = anyio.CancelScope()
        self._open.add(work)
        self._by_key[key] += 1
        try:
            yield work
        finally:
            self._open.discard(work)
            self._by_key[key] -= 1
            if not self._by_key[key]:
                del self._by_key[key]
            if self._closed and not self._open:
                self._idle.set()

    def close(self) -> None:
        """Admit nobody from now on."""
        self._closed = True
        if not self._open:
            self._idle.set()

    async def wait_empty(self) -> None:
        """After :meth:`close`: return when the last request has been answered."""
        await self._idle.wait()

    def end_all(self) -> None:
        """Stop the work of every open request; each still answers with an error."""
        for work in self._open:
            work.cancel()


def shutting_down() -> OverloadedError:
    return OverloadedError("the server is shutting down; try again later or elsewhere", retry_after=5, draining=True)
