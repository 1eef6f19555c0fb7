"""The engine's way to the API process, and to the next one when that has died."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Final

import anyio

from aphro_core.channel import Channel, ChannelClosedError
from aphro_core.errors import EngineDeadError
from aphro_core.messages import codec
from aphro_core.messages.requests import FromEngine, ToEngine

_WAIT_SECONDS: Final = 60.0  # for the next API process: it is forked, and reads its tokenizer later


class ApiLink:
    """What is sent while there is no API process is heard by nobody, and that is no error."""

    def __init__(self, channel: Channel[FromEngine, ToEngine], door: socket.socket) -> None:
        self._channel = channel
        self._door = door

    async def send(self, message: FromEngine) -> None:
        with suppress(ChannelClosedError):  # which ``receive`` says, too
            await self._channel.send(message)

    async def receive(self) -> ToEngine:
        """Raises ChannelClosedError when the API process is gone."""
        return await self._channel.receive()

    async def wait_next(self) -> None:
        """After ChannelClosedError: from now on talk to the next API process. Raises EngineDeadError: none has come."""
        await self._channel.aclose()
        with anyio.move_on_after(_WAIT_SECONDS):
            await anyio.wait_readable(self._door)
            _, fds, _, _ = socket.recv_fds(self._door, 64, 1)
            if fds:
                self._channel = await Channel.over(socket.socket(fileno=fds[0]), codec.engine_side_of_api())
                return
        raise EngineDeadError("the API process has died, and no other one has taken its engine over")
