"""What a request's consumer reads: deltas of its choices, those of one choice merged while nobody reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Self

import anyio

from aphro_core.errors import EngineDeadError, RequestFailedError
from aphro_core.request import OutputDelta


class Answer:
    """An async iterator of deltas, ending when all ``num_choices`` choices have finished.

    At most one delta a choice waits here, so that a slow reader costs no more memory than its tokens. A delta that
    shows nothing waits for the next one of its choice. ``before_read`` runs in the reader's task before it looks.
    """

    def __init__(self, num_choices: int, before_read: Callable[[], Awaitable[None]]) -> None:
        self._num_open = num_choices
        self._before_read = before_read
        self._ready: dict[int, OutputDelta] = {}  # by choice, oldest first
        self._quiet: dict[int, OutputDelta] = {}
        self._failure: Exception | None = None
        self._news = anyio.Event()

    def put(self, delta: OutputDelta, *, shows: bool) -> None:
        """Add what a choice gained. ``shows``: a reader has something to do with it."""
        earlier = self._ready.get(delta.index)
        if earlier is None:
            earlier = self._quiet.pop(delta.index, None)
            if earlier is not None:
                _merge(earlier, delta)
                delta = earlier
            (self._ready if shows else self._quiet)[delta.index] = delta
        else:
            _merge(earlier, delta)
        if shows:
            self._news.set()

    def fail(self, failure: EngineDeadError | RequestFailedError) -> None:
        """Nothing follows; the reader gets what is ready, then this error."""
        self._failure = failure
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> OutputDelta:
        while True:
            await self._before_read()
            if self._ready:
                delta = self._ready.pop(next(iter(self._ready)))
                self._num_open -= delta.finish_reason is not None
                return delta
            if self._num_open == 0:
                raise StopAsyncIteration
            if self._failure is not None:
                raise self._failure
            self._news = anyio.Event()
            await self._news.wait()


def _merge(earlier: OutputDelta, later: OutputDelta) -> None:
    earlier.text += later.text
    earlier.token_ids += later.token_ids
    if later.logprobs is not None:
        if earlier.logprobs is None:
            earlier.logprobs = []
        earlier.logprobs += later.logprobs  # in place: a long answer has as many pieces as tokens
    if later.finish_reason is not None:
        earlier.finish_reason, earlier.stop_reason = later.finish_reason, later.stop_reason
    if later.prompt_logprobs is not None:
        earlier.prompt_logprobs = later.prompt_logprobs
    earlier.num_cached_tokens = max(earlier.num_cached_tokens, later.num_cached_tokens)
