"""A member's open door: each connection a thread, each request a method of whoever answers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from aphro_core.channel import ChannelClosedError
from aphro_core.cluster.messages import Answer, Refused, Request
from aphro_core.cluster.wire import Serving, accept
from aphro_core.errors import AphroError

_MAX_CONNECTIONS: Final = 64  # at once; more than that are strangers, and wait in the kernel's queue
_PAUSE_SECONDS: Final = 0.2
Respond = Callable[[Request, Serving], Answer | None]


class Service:
    """``respond`` gives the answer, or None where it has spoken on the channel itself."""

    def __init__(self, door: socket.socket, token: str, respond: Respond) -> None:
        self._door = door
        self._token = token
        self._respond = respond
        self._places = threading.Semaphore(_MAX_CONNECTIONS)

    def start(self) -> None:
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._door.accept()
            except OSError:
                if self._door.fileno() < 0:
                    return  # closed
                time.sleep(_PAUSE_SECONDS)  # no file descriptors for now, say: the door must not stay shut for that
                continue
            self._places.acquire()
            threading.Thread(target=self._serve, args=(connection,), name="caller", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            channel = accept(connection, self._token)
            if channel is not None:
                self._answer(channel)
                channel.close()
        finally:
            self._places.release()

    def _answer(self, channel: Serving) -> None:
        with suppress(ChannelClosedError):  # the caller is gone
            try:
                answer = self._respond(channel.receive(), channel)
            except AphroError as error:
                answer = Refused(error.message, error.hint or "")
            except ValueError as error:  # msgspec's errors are that
                answer = Refused(f"not understood: {error}", "the same version of aphro on all nodes")
            if answer is not None:
                channel.send(answer)


def open_door(address: str, port: int) -> socket.socket:
    """Listen at this address alone. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=64)
