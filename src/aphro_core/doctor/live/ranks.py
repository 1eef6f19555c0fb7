"""The driver's end of the live check's ranks: started on their hosts, asked with a limit, pinged when silent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import anyio
import msgspec

from aphro_core.doctor.live.protocol import FromRank, Ping, Pong, RankFailed, RankLog, SendLog, ToRank
from aphro_core.remote.remote import Host, HostUnreachableError, Process

_PING_SECONDS: Final = 2.0
_END_SECONDS: Final = 0.5  # for ssh to tell why a process ended
_Reply = TypeVar("_Reply")


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its host, the device there, and the address by which its peers reach the host."""

    host: Host
    device: str
    address: str
    interface: str | None

    @property
    def label(self) -> str:
        where = self.host.name or "this host"
        return where if self.device == "cpu" else f"{where} {self.device}"


class Rank:
    """One rank. What it says while nobody asked is kept until somebody does."""

    def __init__(self, number: int, place: Place, process: Process) -> None:
        self.number = number
        self.place = place
        self._process = process
        self._decoder = msgspec.json.Decoder(FromRank)
        self._unread: list[FromRank] = []

    @property
    def label(self) -> str:
        return f"rank {self.number} ({self.place.label})"

    async def tell(self, message: ToRank) -> None:
        await self._process.send_line(msgspec.json.encode(message).decode())

    async def reply(self, kind: type[_Reply]) -> _Reply | RankFailed:
        """Its next answer of a kind, or that it failed. The caller sets a limit; nothing is lost when it strikes."""
        while True:
            for message in self._unread:
                if isinstance(message, kind) or (isinstance(message, RankFailed) and kind not in (Pong, RankLog)):
                    self._unread.remove(message)
                    return message
            line = await self._process.receive_line()
            if line is None:
                return RankFailed("running", await self._last_words())
            self._unread.append(self._decoder.decode(line))

    async def ping(self) -> Pong | None:
        """What it is doing, None if it does not answer: stopped, dead, or cut off."""
        try:
            with anyio.fail_after(_PING_SECONDS):
                await self.tell(Ping())
                answer = await self.reply(Pong)
        except (TimeoutError, HostUnreachableError):
            return None
        return answer if isinstance(answer, Pong) else None

    async def log(self) -> str:
        """Its NCCL log, "" if it cannot be had any more."""
        try:
            with anyio.fail_after(_PING_SECONDS):
                await self.tell(SendLog())
                answer = await self.reply(RankLog)
        except (TimeoutError, HostUnreachableError):
            return ""
        return answer.text if isinstance(answer, RankLog) else ""

    async def _last_words(self) -> str:
        code: int | None = None
        with anyio.move_on_after(_END_SECONDS):
            code = await self._process.wait()
        words = [line for line in self._process.stderr_tail.splitlines() if line.strip()]
        return f"its process ended{'' if code is None else f' with code {code}'}: {words[-1] if words else 'no word'}"


@asynccontextmanager
async def open_ranks(places: Sequence[Place], env: Mapping[str, str]) -> AsyncIterator[list[Rank]]:
    """Start a rank at each place, with ``env`` added to its host's environment. They end with the block, or with us."""
    async with AsyncExitStack() as stack:
        ranks = []
        for number, place in enumerate(places):
            argv = [place.host.python, "-m", "aphro_core.doctor.live.rank"]
            process = await stack.enter_async_context(place.host.start(*argv, env=env))
            ranks.append(Rank(number, place, process))
        yield ranks
