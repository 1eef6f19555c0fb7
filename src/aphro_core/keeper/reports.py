"""What the API process tells its keeper: that it serves, that its loop runs, and which engine it has."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Final

import msgspec

from aphro_core.held_engine import NUM_FDS, HeldEngine

_MAX_BYTES: Final = 256


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The loop runs."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """It serves: from now on it is replaced when it dies."""


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    """Its loop has ended on purpose: no beat follows."""


class Engine(msgspec.Struct, frozen=True, tag="engine"):
    """Its engine, whose descriptors come along."""

    epoch: int
    pid: int


Report = Beat | Ready | Leaving | Engine
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Report).decode


class Reporting:
    """The API process's end. A keeper that does not read is no reason to wait."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)

    def tell(self, report: Beat | Ready | Leaving) -> None:
        with suppress(BlockingIOError, OSError):
            self._sock.send(_encode(report))

    def hand_on(self, engine: HeldEngine) -> None:
        with suppress(BlockingIOError, OSError):
            socket.send_fds(self._sock, [_encode(Engine(engine.epoch, engine.child.pid))], engine.fds)


class Reports:
    """The keeper's end. ``has_served``: this API process or one before it; their engine goes from one to the next."""

    def __init__(self, sock: socket.socket, earlier: Reports | None = None) -> None:
        self._sock = sock
        sock.setblocking(False)
        self.is_ready = self.is_leaving = False
        self.has_served: bool = earlier is not None and earlier.has_served
        self._engine: Engine | None = None
        self._engine_fds: list[int] = []
        if earlier is not None:
            self._engine, self._engine_fds = earlier._engine, earlier._engine_fds

    def held_engine(self) -> HeldEngine | None:
        """In the next API process: the engine of the last one."""
        if self._engine is None:
            return None
        return HeldEngine.of_fds(self._engine.epoch, self._engine.pid, self._engine_fds)

    def take(self) -> int:
        """Read what there is; how many reports it was."""
        num_taken = 0
        with suppress(BlockingIOError, OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(self._sock, _MAX_BYTES, NUM_FDS)
                if not data:
                    break
                num_taken += 1
                self._take(_decode(data), fds)
        return num_taken

    def _take(self, report: Report, fds: list[int]) -> None:
        match report:
            case Ready():
                self.is_ready = self.has_served = True
            case Leaving():
                self.is_leaving = True
            case Engine() if len(fds) == NUM_FDS:
                self._engine = report
                self._engine_fds, fds = fds, self._engine_fds
            case _:
                pass
        for fd in fds:  # of the engine before, or fewer than were sent: then no descriptor was free
            os.close(fd)

    def close(self) -> None:
        self._sock.close()
