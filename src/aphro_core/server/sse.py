"""Event-stream framing, and the writer that keeps a quiet stream open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import anyio
from starlette.types import Send

from aphro_core.server.refusals import HttpError

QUIET_SECONDS: Final = 2.0  # proxies and clients take a longer silence for a dead server
WAITING: Final = b": waiting\n\n"
DONE: Final = b"data: [DONE]\n\n"
EVENT_STREAM: Final = b"text/event-stream"
_HEADERS: Final = [
    (b"content-type", EVENT_STREAM + b"; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(data: bytes) -> bytes:
    """One event; JSON has no line breaks, so one line is enough."""
    return b"data: " + data + b"\n\n"


class EventStream:
    """The writing side of one event stream. ``is_open``: its status is out, its end is not."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_quiet = False
        self.is_open = False
        self.is_finished = False

    async def start(self, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.is_open = True
        await self._send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})

    async def keep_open(self, quiet_seconds: float = QUIET_SECONDS) -> None:
        """For ever: a comment line where nothing was written for half of ``quiet_seconds``, so never later than that.

        A task of its own: a deadline around every wait for a token would cost a third of the token's chunk.
        """
        while True:
            self._is_quiet = True
            await anyio.sleep(quiet_seconds / 2)
            if self._is_quiet:
                await self.write(WAITING)

    async def write(self, events: bytes) -> None:
        self._is_quiet = False
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def finish(self, events: bytes) -> None:
        self.is_open, self.is_finished = False, True
        await self._send({"type": "http.response.body", "body": events, "more_body": False})

    async def fail(self, refusal: HttpError) -> None:
        """End with an error event: the status went out long ago."""
        await self.finish(event(refusal.body()))
