"""From one engine to the next: who is told of what is open, what is tried alone first, and what is given up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import anyio

from aphro_core.errors import AphroError, RequestFailedError
from aphro_core.frontend.request_table import RequestTable, Row
from aphro_core.frontend.suspects import Suspects, rows_of
from aphro_core.messages.requests import AbortSequences, ResumeEngine, ToEngine


class EngineLink(Protocol):
    """The way to one engine. ``send`` raises AphroError once it is gone; another engine has another link."""

    async def send(self, message: ToEngine) -> None: ...


class Recovery:
    """Keeps ``engine``, the one that takes requests, or None while there is none.

    ``is_open`` says of a seq_id whether somebody still waits for it; ``give_up`` ends a request with an error.
    """

    def __init__(
        self,
        table: RequestTable,
        is_open: Callable[[int], bool],
        give_up: Callable[[Row, RequestFailedError], None],
        clock: Callable[[], float],
    ) -> None:
        self.engine: EngineLink | None = None
        self.suspects = Suspects()
        self._table = table
        self._is_open = is_open
        self._give_up = give_up
        self._clock = clock
        self._to_try: list[Row] = []
        self._trying: tuple[Row, set[int]] | None = None  # with its choices that have not got a token yet
        self._has_tried = anyio.Event()
        self._generation = 0  # of what engines know

    @property
    def open_rows(self) -> list[Row]:
        """Requests that are not answered yet, oldest first."""
        return [row for row in self._table if any(self._is_open(choice.seq_id) for choice in row.choices)]

    async def resume(self, engine: EngineLink, *, after_failed_step: bool = False) -> None:
        """Tell an engine that knows nothing of every open request, suspects first, one at a time.

        Ends early when it dies or forgets everything again.
        """
        generation, tried = self._generation, set[int]()
        if after_failed_step:
            await self._send(engine, ResumeEngine())
        while self._to_try and generation == self._generation:
            row = self._to_try.pop(0)
            tried.add(id(row))
            await self._try(engine, row)
        if generation != self._generation:
            return
        self.engine = engine  # it is told of later requests as they come
        for row in [row for row in self._table if id(row) not in tried]:
            if generation == self._generation:  # else another call of this tells the rest
                await self.send_row(engine, row)

    async def send_row(self, engine: EngineLink, row: Row) -> None:
        """The choices that are still open. If the engine is gone, or forgets all meanwhile, they are told again."""
        generation = self._generation
        for choice in row.choices:
            if generation == self._generation and self._is_open(choice.seq_id):
                await self._send(engine, row.add_sequence(choice))

    def take_output(self, seq_id: int) -> None:
        """A sequence has gained something: a suspect is cleared by it."""
        if self._trying is not None:
            self._trying[1].discard(seq_id)
            if not self._trying[1]:
                self._end_trial()

    def forget(self, row: Row) -> None:
        """Nobody waits for this request any more."""
        self.suspects.forget(row)
        if self._trying is not None and self._trying[0] is row:
            self._end_trial()

    def step_failed(self, seq_ids: Sequence[int]) -> None:
        """The engine lives and has forgotten everything. What was tried alone was the reason, else all of the step."""
        tried = self._tried_among(seq_ids)
        self.detach()
        if tried is None:
            self._suspect(rows_of(self.open_rows, seq_ids))
        else:
            self._give_up(tried, step_failed_error())

    def engine_lost(self, seq_ids: Sequence[int] | None, *, is_external: bool) -> None:
        """The engine has died, another one will come. ``seq_ids`` were in its steps; None: all that it had may be."""
        was_serving, tried = self.engine is not None, self._tried_among(seq_ids)
        self.detach()
        if was_serving or tried is not None:
            rows = self.open_rows if seq_ids is None else rows_of(self.open_rows, seq_ids)
            now = self._clock()
            refused, suspects = self.suspects.take_death(rows, tried=tried, is_external=is_external, now=now)
            self._suspect(suspects)
            for row in refused:
                self._give_up(row, poison_error())

    def detach(self) -> None:
        """What the engine knew is void. Whoever was tried is still to be."""
        self.engine = None
        self._generation += 1
        if self._trying is not None:
            self._to_try.insert(0, self._trying[0])
        self._end_trial()

    def _tried_among(self, seq_ids: Sequence[int] | None) -> Row | None:
        """The request that was tried alone, unless it is known to have been in none of the steps."""
        if self._trying is None:
            return None
        tried = self._trying[0]
        return tried if seq_ids is None or rows_of([tried], seq_ids) else None

    def _suspect(self, rows: Sequence[Row]) -> None:
        known = {id(row) for row in self._to_try}
        self._to_try += [row for row in rows if id(row) not in known]

    async def _try(self, engine: EngineLink, row: Row) -> None:
        """Let the engine compute one request alone until each of its choices has got a token."""
        seq_ids = {choice.seq_id for choice in row.choices if self._is_open(choice.seq_id)}
        if seq_ids:
            self._trying, self._has_tried = (row, set(seq_ids)), anyio.Event()
            await self.send_row(engine, row)
            await self._has_tried.wait()
            if left := [seq_id for seq_id in seq_ids if not self._is_open(seq_id)]:
                await self._send(engine, AbortSequences(left))  # nobody waits for it, and the next one is to be alone

    def _end_trial(self) -> None:
        self._trying = None
        self._has_tried.set()

    async def _send(self, engine: EngineLink, message: ToEngine) -> None:
        # half a message would damage all that follow, so a client that leaves does not interrupt it; an engine that
        # does not read sends no pulses either, and whoever watches them ends it
        with anyio.CancelScope(shield=True), suppress(AphroError):
            await engine.send(message)


def step_failed_error() -> RequestFailedError:
    message = "a step with this request alone failed; the server's log has the cause"
    return RequestFailedError(message, code="step_failed")


def poison_error() -> RequestFailedError:
    message = "the engine died under this request, and again when it was tried once more; it is not taken again"
    return RequestFailedError(message, code="poison_request")
