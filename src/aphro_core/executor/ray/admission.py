"""Where ranks of a Ray cluster connect to the engine: a port that is open until all are here, closed to strangers.

Both sides prove that they know the rank's secret before anything else is said, by HMAC-SHA256 over nonces of both, so
that the secret itself never travels here. A connection that does not is closed; each secret is taken once.
"""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

_NONCE_BYTES: Final = 32
_PROOF_BYTES: Final = 32
_RANK_BYTES: Final = 4
_PROOF_SECONDS: Final = 5.0
_MAX_STRANGERS: Final = 64  # connections at once that have proved nothing yet
_CONNECT_SECONDS: Final = 10.0
# without an acknowledgement from the other host, which is asked every 2 s; the kernel's fifth try comes after 6.2 s
_LOST_MILLISECONDS: Final = 6500


class NotAdmittedError(Exception):
    """The other side could not prove that it knows the secret."""


class Admission:
    """The engine's side. ``secrets``: by rank."""

    def __init__(self, secrets: Mapping[int, bytes]) -> None:
        self._waiting = dict(secrets)
        self._streams: dict[int, SocketStream] = {}
        self._arrived = {rank: anyio.Event() for rank in secrets}
        self._strangers = anyio.Semaphore(_MAX_STRANGERS)
        self.port = 0

    async def wait(self, rank: int) -> SocketStream:
        await self._arrived[rank].wait()
        return self._streams[rank]

    async def take(self, stream: SocketStream) -> None:
        """A new connection: of a rank that is waited for, or closed."""
        rank = -1
        with suppress(TimeoutError, anyio.IncompleteRead, anyio.BrokenResourceError, NotAdmittedError):
            async with self._strangers:
                with anyio.fail_after(_PROOF_SECONDS):
                    rank = await self._check(stream)
        if rank < 0:
            await anyio.aclose_forcefully(stream)
            return
        _tune(stream.extra(SocketAttribute.raw_socket))
        self._streams[rank] = stream
        self._arrived[rank].set()

    async def _check(self, stream: SocketStream) -> int:
        ours = os.urandom(_NONCE_BYTES)
        await stream.send(ours)
        said = BufferedByteReceiveStream(stream)  # reads ahead, but the rank says nothing more until it is answered
        number = await said.receive_exactly(_RANK_BYTES)
        theirs, proof = await said.receive_exactly(_NONCE_BYTES), await said.receive_exactly(_PROOF_BYTES)
        rank = int.from_bytes(number, "little")
        secret = self._waiting.get(rank)
        expected = _prove(secret or os.urandom(_PROOF_BYTES), b"rank", number, ours, theirs)
        if not hmac.compare_digest(expected, proof) or secret is None or said.buffer:
            raise NotAdmittedError
        del self._waiting[rank]
        await stream.send(_prove(secret, b"engine", number, ours, theirs))
        return rank


@asynccontextmanager
async def open_admission(address: str, secrets: Mapping[int, bytes]) -> AsyncIterator[Admission]:
    """Listen at ``address``, a free port, while the block lasts. What was admitted stays open."""
    admission = Admission(secrets)
    listener = await anyio.create_tcp_listener(local_host=address, local_port=0, backlog=_MAX_STRANGERS)
    admission.port = int(listener.extra(SocketAttribute.local_port))
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, admission.take)
        yield admission
        tasks.cancel_scope.cancel()


def join(address: str, port: int, rank: int, secret: bytes) -> socket.socket:
    """The rank's side: connect, prove, have it proved. Raises OSError or NotAdmittedError."""
    joined = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
    try:
        number, ours = rank.to_bytes(_RANK_BYTES, "little"), os.urandom(_NONCE_BYTES)
        theirs = _receive_exactly(joined, _NONCE_BYTES)
        joined.sendall(number + ours + _prove(secret, b"rank", number, theirs, ours))
        proof = _receive_exactly(joined, _PROOF_BYTES)
        if not hmac.compare_digest(_prove(secret, b"engine", number, theirs, ours), proof):
            raise NotAdmittedError("what answers there is not the engine")
        joined.settimeout(None)
        _tune(joined)
    except BaseException:
        joined.close()
        raise
    return joined


def _prove(secret: bytes, who: bytes, *said: bytes) -> bytes:
    return hmac.digest(secret, who + b"".join(said), "sha256")


def _receive_exactly(joined: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = joined.recv(num_bytes - len(data))
        if not more:
            raise NotAdmittedError("the engine closed the connection")
        data += more
    return data


def _tune(joined: socket.socket) -> None:
    """Small frames at once; a host that is gone is noticed."""
    joined.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    joined.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _LOST_MILLISECONDS)
