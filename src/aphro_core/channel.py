"""Framed messages over a stream socket: an async end for event loops, a blocking end for a worker's thread."""

from __future__ import annotations

import socket
from typing import Final, Generic, TypeVar

import anyio
import anyio.abc

from aphro_core.messages.codec import MAX_FRAME_BYTES, Codec

Out = TypeVar("Out")
In = TypeVar("In")

_READ_BYTES: Final = 256 * 1024
_LENGTH_BYTES: Final = 4


class ChannelClosedError(Exception):
    """The peer is gone; what it sent before has been received."""


class Frames:
    """Cuts a byte stream into frames."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def take(self) -> bytes | None:
        """The next whole frame's body, or None. Raises ValueError for a length beyond the cap."""
        if len(self._buffer) < _LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "little")
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {length} bytes is announced, allowed: up to {MAX_FRAME_BYTES}")
        end = _LENGTH_BYTES + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_LENGTH_BYTES:end])
        del self._buffer[:end]
        return body


class Channel(Generic[Out, In]):
    """The event loop's end. One reader at a time; any number of senders."""

    def __init__(self, stream: anyio.abc.ByteStream, codec: Codec[Out, In]) -> None:
        self._stream = stream
        self._codec = codec
        self._frames = Frames()
        self._send_lock = anyio.Lock()
        self._unsent = bytearray()
        self._is_broken = False

    @classmethod
    async def over(cls, sock: socket.socket, codec: Codec[Out, In]) -> Channel[Out, In]:
        """Take over a connected Unix socket (the channel closes it)."""
        return cls(await anyio.abc.UNIXSocketStream.from_socket(sock), codec)

    async def send(self, message: Out) -> None:
        """Raises :class:`ChannelClosedError` when the peer is gone.

        What several tasks send in one turn of the loop goes out together, in order, and so is read together. So a
        message whose sender is cancelled while it waits goes out with the next one, whole and before it; whoever
        cannot have that shields the call. Nothing follows a message that was cut off.
        """
        self._unsent += self._codec.encode(message)
        try:
            async with self._send_lock:
                if self._is_broken:
                    raise ChannelClosedError
                if self._unsent:
                    frames, self._unsent = self._unsent, bytearray()
                    self._is_broken = True  # until all of it is out: asyncio's own cancellation knows no shield
                    with anyio.CancelScope(shield=True):
                        await self._stream.send(bytes(frames))
                    self._is_broken = False
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise ChannelClosedError from error

    async def receive(self) -> In:
        """The next message. Raises :class:`ChannelClosedError` at the end of the stream."""
        while (body := self._frames.take()) is None:
            try:
                self._frames.feed(await self._stream.receive(_READ_BYTES))
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                raise ChannelClosedError from error
        return self._codec.decode(body)

    async def aclose(self) -> None:
        await self._stream.aclose()


class BlockingChannel(Generic[Out, In]):
    """A worker's end: plain blocking calls, since between two steps a worker has nothing else to do."""

    def __init__(self, sock: socket.socket, codec: Codec[Out, In]) -> None:
        self._sock = sock
        self._codec = codec
        self._frames = Frames()
        sock.setblocking(True)

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Out) -> None:
        try:
            self._sock.sendall(self._codec.encode(message))
        except OSError as error:
            raise ChannelClosedError from error

    def receive(self) -> In:
        while (body := self._frames.take()) is None:
            try:
                data = self._sock.recv(_READ_BYTES)
            except OSError as error:
                raise ChannelClosedError from error
            if not data:
                raise ChannelClosedError
            self._frames.feed(data)
        return self._codec.decode(body)

    def set_timeout(self, seconds: float | None) -> None:
        """From now on a wait longer than that counts as a closed channel; None: no wait does."""
        self._sock.settimeout(seconds)

    def close(self) -> None:
        self._sock.close()
