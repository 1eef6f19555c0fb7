"""A rank's process on a node of a Ray cluster, as far as it can be seen from here."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Final

import anyio

from aphro_core.executor.rank import WorkerChannel
from aphro_core.executor.ray.link import RayLink
from aphro_core.executor.ray.protocol import KillRank, RankEnded
from aphro_core.remote.ssh import last_line

_CLOSE_SECONDS: Final = 1.0  # after a rank's end: its last frames have been read


class RayRank:
    """Known by what its agent, or Ray, says of it."""

    def __init__(self, rank: int, link: RayLink) -> None:
        self._rank = rank
        self._link = link
        self._ended: RankEnded | None = None
        self.is_gone = anyio.Event()
        self.pid = 0  # that of another host, which WorkerLoaded tells

    def end(self, ended: RankEnded) -> None:
        if self._ended is None:
            self._ended = ended
            self.is_gone.set()

    @property
    def exit_code(self) -> int | None:
        return self._ended.exit_code if self._ended else None

    @property
    def is_lost(self) -> bool:
        """Also where its channel is closed and nobody has said why: whoever could say it is as far away as it is."""
        return self._ended is None or self._ended.exit_code is None

    @property
    def was_short(self) -> bool:
        return self._ended is not None and self._ended.was_short

    def poll(self) -> bool:
        return self._ended is not None

    async def wait(self) -> None:
        await self.is_gone.wait()

    def send_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGKILL:
            self._link.tell(KillRank(self._rank))

    def describe_end(self) -> str:
        ended = self._ended
        if ended is None:
            return "was lost: its connection broke, and nothing is heard of its end"
        if ended.exit_code is None:
            return f"was lost: {ended.words}"
        if ended.exit_code < 0:
            return f"was killed by signal {-ended.exit_code} ({signal.Signals(-ended.exit_code).name})"
        return f"ended ({last_line(ended.words) or f'exit code {ended.exit_code}'})"

    def close(self) -> None:
        """Its agent ends it, at the latest."""


def follow(link: RayLink, ranks: Sequence[RayRank]) -> None:
    """Let every rank know its end, also when nobody can tell it any more."""

    def end_all(words: str) -> None:
        for rank, process in enumerate(ranks):
            process.end(RankEnded(rank, None, words))

    link.on_ended = lambda ended: ranks[ended.rank].end(ended)
    link.on_lost = end_all


async def close_after_end(rank: RayRank, channel: WorkerChannel) -> None:
    """Where a node is gone nothing says so on the channel itself."""
    await rank.wait()
    await anyio.sleep(_CLOSE_SECONDS)
    await channel.aclose()
