"""HTTP/1.1 read strictly, head by head: no second meaning, no other protocol, a deadline, a cap on connections.

hypercorn (through h11) is as lenient as the RFC allows: it merges repeated lengths, unfolds lines, takes bare line
feeds and a length beside a transfer coding, and switches to HTTP/2 when asked. A proxy in front that reads one of
these differently can be made to see other requests than we do. What has two readings is answered 400, and the
connection ends.
"""

from __future__ import annotations

import asyncio
import re
import resource
from typing import Any, Final

import anyio
import h11
import hypercorn.protocol
from hypercorn.asyncio.worker_context import AsyncioSingleTask
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import H11Protocol

from aphro_core.server.sse import EVENT_STREAM

HEAD_SECONDS: Final = 10.0  # from a connection, or a head's first byte, to the head's last one
MAX_CONNECTIONS: Final = 4096
_SPARE_FILES: Final = 256  # of the process's own: channels, pipes, the model's files
_END: Final = b"\r\n\r\n"
_BUSY: Final = (
    b"HTTP/1.1 503 \r\nretry-after: 2\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: 112\r\n\r\n"
    b'{"error":{"message":"too many connections","type":"service_unavailable","param":null,"code":"too_many_clients"}}'
)
_FRAMING: Final = re.compile(rb"\r\n(content-length|transfer-encoding)[ \t]*:([^\r\n]*)", re.IGNORECASE)


def ambiguity_of(head: bytes) -> str | None:
    """What is wrong with a request's head (its lines, the empty one included), as a short reason; None if nothing."""
    line, _, _ = head.partition(b"\r\n")
    if not re.fullmatch(rb"[A-Z]{1,20} [\x21-\x7e]+ HTTP/1\.[01]", line):
        return "the request line is not that of HTTP/1.1"
    if b"\n" in head.replace(b"\r\n", b"") or b"\r" in head.replace(b"\r\n", b""):
        return "a line ends without CR LF"
    if b"\r\n " in head or b"\r\n\t" in head:
        return "a header is folded over lines"
    framing = _FRAMING.findall(head)
    if len(framing) > 1:
        return "the body's length is given more than once"
    for name, value in framing:
        given = value.strip(b" \t").lower()
        if not (given.isdigit() if name.lower() == b"content-length" else given == b"chunked"):
            return "the body's length is neither a number nor chunked"
    return None


class StrictConnection(h11.Connection):
    """h11, with each head looked at in its raw form before it is parsed."""

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            data, _ = self.trailing_data
            end = data.find(_END)
            if end >= 0 and (reason := ambiguity_of(data[: end + len(_END)].lstrip(b"\r\n"))):
                raise h11.RemoteProtocolError(reason, error_status_hint=400)
            # h11 would take a head that ends in bare line feeds, and with it whatever a proxy took for its body
            if end < 0 and b"\n\n" in data:
                raise h11.RemoteProtocolError("a line ends without CR LF", error_status_hint=400)
        return super().next_event()


class Connections:
    """How many are open, against the cap."""

    def __init__(self) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_open = max(16, min(MAX_CONNECTIONS, files - _SPARE_FILES))
        self.num_open = 0

    def take(self, task: asyncio.Task[Any] | None) -> None:
        """Count one until the task that serves it is done, however it ends."""
        assert task is not None
        self.num_open += 1
        task.add_done_callback(self._release)

    def _release(self, task: asyncio.Task[Any]) -> None:
        self.num_open -= 1


class StrictProtocol(H11Protocol):
    """One connection."""

    connections = Connections()

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.connection = StrictConnection(h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size)
        self._head_timer = AsyncioSingleTask()
        self._waits_for_head = False
        self._writes_chunks = False

    async def initiate(self) -> None:
        if self.connections.num_open >= self.connections.max_open:
            await self.send(RawData(data=_BUSY))
            await self.send(Closed())
            return
        self.connections.take(asyncio.current_task())
        await self._start_timer()

    async def handle(self, event: Event) -> None:
        if isinstance(event, Closed):
            await self._head_timer.stop()
            # hypercorn waits out the idle timeout of a connection that is gone, with its socket still open
            await self.send(Updated(idle=False))
        await super().handle(event)
        if isinstance(event, RawData) and isinstance(self.connection, StrictConnection):
            await self._watch_head(self.connection)

    async def stream_send(self, event: StreamEvent) -> None:
        """As hypercorn's, but the chunks of an event stream are framed here: h11 takes a tenth of a token's time."""
        if self._writes_chunks and isinstance(event, Body) and self.connection.our_state is h11.SEND_BODY:
            if event.data:
                await self.send(RawData(data=b"%x\r\n%b\r\n" % (len(event.data), event.data)))
            return
        if isinstance(event, Response) and isinstance(self.connection, StrictConnection):
            is_stream = any(name == b"content-type" and value.startswith(EVENT_STREAM) for name, value in event.headers)
            self._writes_chunks = is_stream and self.connection.their_http_version == b"1.1"
        await super().stream_send(event)

    async def _watch_head(self, connection: StrictConnection) -> None:
        """A head that has begun has its deadline; between requests the connection is idle, which hypercorn bounds."""
        is_partial = connection.their_state is h11.IDLE and bool(connection.trailing_data[0])
        if is_partial and not self._waits_for_head:
            await self._start_timer()
        elif not is_partial and self._waits_for_head:
            self._waits_for_head = False
            await self._head_timer.stop()

    async def _start_timer(self) -> None:
        self._waits_for_head = True
        await self._head_timer.restart(self.task_group, self._end_late)

    async def _end_late(self) -> None:
        await anyio.sleep(HEAD_SECONDS)
        await self.send(Closed())

    async def _check_protocol(self, event: h11.Request) -> None:
        """Where hypercorn would change over to HTTP/2: never, so an upgrade is ignored, as the RFC has it."""


def install() -> None:
    """Make hypercorn read every connection so. It has no option for it: the class is looked up by this name."""
    hypercorn.protocol.H11Protocol = StrictProtocol  # type: ignore[attr-defined,assignment]
