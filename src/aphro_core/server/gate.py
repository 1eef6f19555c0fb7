"""Counts the open requests: refuses more than the queue holds, refuses all when draining, ends what is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio

from aphro_core.errors import OverloadedError

_RETRY_SECONDS: Final = 2


class Gate:
    """Where every request that will use the engine passes, before its body is parsed."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
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
    def admit(self) -> Iterator[anyio.CancelScope]:
        """Hold a place in the block; do the request's work within the scope: cancelled means "stop now, and say so".

        Raises OverloadedError: draining, or ``max_open`` requests are open.
        """
        if self._closed:
            raise shutting_down()
        if len(self._open) >= self._max_open:
            message = f"{self._max_open} requests are open already, which is what this server queues; try again"
            raise OverloadedError(message, retry_after=_RETRY_SECONDS)
        work = anyio.CancelScope()
        self._open.add(work)
        try:
            yield work
        finally:
            self._open.discard(work)
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
