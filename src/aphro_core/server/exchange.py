"""One request on the wire: its body within limits, its answer whole even where the body is left unread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import anyio
from starlette.types import Message, Receive, Scope, Send

from aphro_core.errors import OverloadedError, first_cause
from aphro_core.server.refusals import HttpError

MAX_BODY_BYTES: Final = 32 * 2**20
MAX_UNPARSED_BYTES: Final = 8 * MAX_BODY_BYTES  # of all bodies that are read and not yet token ids, at one time
MAX_HEADERS: Final = 100
MAX_HEADER_BYTES: Final = 32 * 2**10
BODY_SECONDS: Final = 30.0
_LINGER_SECONDS: Final = 1.0


class Exchange:
    """``receive`` and ``send`` of one request, aware of whether the body has been read.

    An answer that is sent over an unread body would be lost: the server closes the connection, the client's kernel
    sees a reset before its reader sees the answer. So the rest of the body is read away first, for a while.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._body_is_read = False
        self._is_gone = False

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):
            self._body_is_read = True
        return message

    async def send(self, message: Message) -> None:
        """As hypercorn's own: nothing happens once the client is gone, which ``receive`` says."""
        if self._is_gone:
            return
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        try:
            if is_last and not self._body_is_read:
                await self._send_over_body(message)
            else:
                await self._send(message)
        except (OSError, ExceptionGroup) as error:
            if not isinstance(first_cause(error), OSError):
                raise
            self._is_gone = True  # the kernel gave the client up; hypercorn expects no other end than a reset

    async def _send_over_body(self, message: Message) -> None:
        await self._send({**message, "more_body": True})
        with anyio.move_on_after(_LINGER_SECONDS):
            await self._discard()
        await self._send_last()

    async def _discard(self) -> None:
        while not self._body_is_read:
            await self.receive()

    async def _send_last(self) -> None:
        """hypercorn announces the end on the same bounded queue that the body fills: keep it flowing."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._discard)
            await self._send({"type": "http.response.body", "body": b""})
            tasks.cancel_scope.cancel()


def check_head(scope: Scope) -> None:
    """Raises HttpError: 431 for a header bomb, 400 for a target that is no path (a whole URL, ``*``)."""
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise HttpError(
            431,
            f"{len(headers)} headers of {size} bytes, allowed: {MAX_HEADERS} of {MAX_HEADER_BYTES} bytes in all",
            code="headers_too_large",
            closes=True,
        )
    if not (scope.get("raw_path") or b"/").startswith(b"/"):
        raise _bad_target()


def check_target(path: str) -> None:
    """Raises HttpError (400) for steps, doubled slashes and what some servers cut off: elsewhere it leads elsewhere."""
    steps = path.split("/")[1:]
    is_plain = "\\" not in path and "#" not in path and path.isprintable()
    if not is_plain or "." in steps or ".." in steps or "" in steps[:-1]:
        raise _bad_target()


def _bad_target() -> HttpError:
    return HttpError(400, "the request's target is not a plain path", code="bad_target", closes=True)


@dataclass(slots=True)
class HeldBody:
    """A body, which counts against what all bodies together may take until it is dropped."""

    data: bytes
    _reader: BodyReader

    def drop(self) -> None:
        """What it said is known by now. May be called again."""
        self._reader.release(len(self.data))
        self.data = b""


class BodyReader:
    """Reads bodies: JSON only, not compressed, each bounded in size and time, all together bounded in memory."""

    def __init__(
        self,
        *,
        max_bytes: int = MAX_BODY_BYTES,
        max_unparsed_bytes: int = MAX_UNPARSED_BYTES,
        seconds: float = BODY_SECONDS,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_unparsed_bytes = max_unparsed_bytes
        self._seconds = seconds
        self._unparsed_bytes = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """A body that is done with at once. Raises as ``hold`` does."""
        body = await self.hold(scope, receive)
        data = body.data
        body.drop()
        return data

    async def hold(self, scope: Scope, receive: Receive) -> HeldBody:
        """A body that is done with later: the caller drops it.

        Raises HttpError (408, 413, 415; 499: nobody waits for the answer) or OverloadedError.
        """
        headers = dict(scope["headers"])
        _check_type(headers)
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        is_whole = False
        try:
            with anyio.fail_after(self._seconds):
                await self._fill(body, receive)
            is_whole = True
        except TimeoutError:
            message = f"the body did not arrive within {self._seconds:g} s"
            raise HttpError(408, message, code="body_timeout", closes=True) from None
        finally:
            if not is_whole:
                self.release(len(body))
        return HeldBody(bytes(body), self)

    def release(self, num_bytes: int) -> None:
        """So many bytes of bodies are gone."""
        self._unparsed_bytes -= num_bytes

    async def _fill(self, body: bytearray, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HttpError(499, "the client left before its request was complete", code="client_left", closes=True)
            piece = message.get("body", b"")
            if len(body) + len(piece) > self._max_bytes:
                raise self._too_large()
            if self._unparsed_bytes + len(piece) > self._max_unparsed_bytes:
                raise OverloadedError("too many large bodies are being read at the same time; try again")
            body += piece
            self._unparsed_bytes += len(piece)
            if not message.get("more_body", False):
                return

    def _too_large(self) -> HttpError:
        message = f"the body is too large, allowed: up to {self._max_bytes} bytes"
        return HttpError(413, message, code="body_too_large", closes=True)


def _check_type(headers: dict[bytes, bytes]) -> None:
    given = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if given != b"application/json":
        named = given.decode("latin-1")[:80] or "missing"
        message = f"Content-Type is {named}, allowed: application/json"
        raise HttpError(415, message, code="unsupported_media_type")
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        named = encoding.decode("latin-1")[:80]
        message = f"Content-Encoding is {named}, allowed: none (send the body uncompressed)"
        raise HttpError(415, message, code="unsupported_content_encoding")


@asynccontextmanager
async def until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Once the body is read: cancel the block when the client leaves. hypercorn says so in ``receive`` alone."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_when_gone, receive, tasks.cancel_scope)
        yield
        tasks.cancel_scope.cancel()


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
