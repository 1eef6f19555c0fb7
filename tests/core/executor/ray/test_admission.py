"""The engine's port takes each rank once, by its secret, and nobody else; a rank refuses another engine."""

from __future__ import annotations

import os
import socket
from functools import partial

import anyio
import anyio.to_thread
import pytest

from aphro_core.executor.ray import admission
from aphro_core.executor.ray.admission import NotAdmittedError, join, open_admission

SECRETS = {0: os.urandom(32), 1: os.urandom(32)}
LOCAL = "127.0.0.1"


def test_ranks_are_taken() -> None:
    async def main() -> None:
        async with open_admission(LOCAL, SECRETS) as admitted:
            joined = {
                rank: await anyio.to_thread.run_sync(join, LOCAL, admitted.port, rank, secret)
                for rank, secret in reversed(SECRETS.items())
            }
            streams = {rank: await admitted.wait(rank) for rank in SECRETS}
            port = admitted.port
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOCAL, port))
        for rank, sock in joined.items():  # also once the port is closed
            sock.sendall(b"rank%d" % rank)
            assert await streams[rank].receive() == b"rank%d" % rank
            await streams[rank].send(b"engine")
            assert sock.recv(6) == b"engine"
            sock.close()
            await streams[rank].aclose()

    anyio.run(main)


def test_strangers_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_PROOF_SECONDS", 0.2)

    def is_closed(port: int, said: bytes) -> bool:
        with socket.create_connection((LOCAL, port), timeout=5) as stranger:
            stranger.recv(32)
            stranger.sendall(said)
            return stranger.recv(1) == b""

    async def main() -> None:
        async with open_admission(LOCAL, SECRETS) as admitted:
            attempt = partial(anyio.to_thread.run_sync, join, LOCAL, admitted.port)
            for rank, secret in ((0, os.urandom(32)), (1, SECRETS[0]), (7, SECRETS[0])):
                with pytest.raises(NotAdmittedError):
                    await attempt(rank, secret)
            for said in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(68), os.urandom(5000)):
                assert await anyio.to_thread.run_sync(is_closed, admitted.port, said)
            (await attempt(0, SECRETS[0])).close()
            with pytest.raises(NotAdmittedError):  # taken already
                await attempt(0, SECRETS[0])
            (await attempt(1, SECRETS[1])).close()

    anyio.run(main)


def test_another_engine_is_refused() -> None:
    async def main() -> None:
        async with open_admission(LOCAL, {0: SECRETS[1]}) as other:
            with pytest.raises(NotAdmittedError):
                await anyio.to_thread.run_sync(join, LOCAL, other.port, 0, SECRETS[0])

    anyio.run(main)


def test_an_echo_is_no_engine() -> None:
    """What plays a rank's own proof back to it has proved nothing."""

    def echo(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(os.urandom(32))
            said = peer.recv(68, socket.MSG_WAITALL)
            peer.sendall(said[36:])

    async def main() -> None:
        with socket.create_server((LOCAL, 0)) as listener:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.to_thread.run_sync, echo, listener)
                with pytest.raises(NotAdmittedError):
                    await anyio.to_thread.run_sync(join, LOCAL, listener.getsockname()[1], 0, SECRETS[0])

    anyio.run(main)
