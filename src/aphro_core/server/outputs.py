"""The deltas of one body's requests, merged: whatever has come is taken at once, so that a slow writer catches up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import anyio

from aphro_core.request import OutputDelta, Request
from aphro_core.server.contract import Frontend

# (index of the request among the body's prompts, what it gained)
Gain = tuple[int, OutputDelta]


class Outputs(Protocol):
    async def take(self) -> list[Gain]:
        """Wait for the next gains and take what has come; empty once every request has ended."""
        ...


class _One:
    """One request with one choice, as most are: nothing to merge, so no task between the engine and the writer."""

    def __init__(self, deltas: AsyncIterator[OutputDelta]) -> None:
        self._deltas = deltas

    async def take(self) -> list[Gain]:
        async for delta in self._deltas:
            return [(0, delta)]
        return []


class _Many:
    def __init__(self, num_streams: int) -> None:
        self._num_streams = num_streams
        self._gains: list[Gain] = []
        self._wake = anyio.Event()

    async def take(self) -> list[Gain]:
        while not self._gains and self._num_streams:
            self._wake = anyio.Event()
            await self._wake.wait()
        gains, self._gains = self._gains, []
        return gains

    async def pump(self, index: int, deltas: AsyncIterator[OutputDelta]) -> None:
        async for delta in deltas:
            self._gains.append((index, delta))
            self._wake.set()
        self._num_streams -= 1
        self._wake.set()


@asynccontextmanager
async def open_outputs(frontend: Frontend, requests: Sequence[Request]) -> AsyncIterator[Outputs]:
    """Start the requests; leaving the block aborts those that have not ended. Raises what ``frontend.stream`` does."""
    if len(requests) == 1 and requests[0].sampling.n == 1:
        async with frontend.stream(requests[0]) as deltas:
            yield _One(deltas)
        return
    outputs = _Many(len(requests))
    async with AsyncExitStack() as streams, anyio.create_task_group() as tasks:
        for index, request in enumerate(requests):
            deltas = await streams.enter_async_context(frontend.stream(request))
            tasks.start_soon(outputs.pump, index, deltas)
        yield outputs
        tasks.cancel_scope.cancel()
