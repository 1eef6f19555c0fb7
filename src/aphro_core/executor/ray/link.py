"""The process that speaks to Ray for us, as seen from here: started, asked, and gone when the block is left."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectSendStream

from aphro_core.config import RayCluster
from aphro_core.errors import AphroError, ExitCode, ModelError, PlacementError, UsageError
from aphro_core.executor.ray.protocol import (
    Agents,
    Cluster,
    Connect,
    DigestFiles,
    FilesDigested,
    FromDriver,
    Look,
    OpenAgents,
    RankEnded,
    Refused,
    ToDriver,
)
from aphro_core.remote import process
from aphro_core.remote.remote import HostUnreachableError
from aphro_core.remote.ssh import last_line

_ANSWER_SECONDS: Final = 30.0
_CLOUD: Final = "ray://"

Answer = TypeVar("Answer", Cluster, Agents)


class RayLink:
    """One question at a time. ``on_ended`` hears of ranks, each once, and of all of them when the process is gone."""

    def __init__(self, driver: process.LineProcess, where: RayCluster) -> None:
        self._driver = driver
        self._where = where
        self._send_answer, self._answers = anyio.create_memory_object_stream[FromDriver](math.inf)
        self._send_request, self._requests = anyio.create_memory_object_stream[ToDriver](math.inf)
        self._digests: dict[int, MemoryObjectSendStream[FilesDigested]] = {}
        self._decoder = msgspec.json.Decoder(FromDriver)
        self.on_ended: Callable[[RankEnded], None] = lambda ended: None
        self.on_lost: Callable[[str], None] = lambda words: None

    async def connect(self) -> Cluster:
        """Join the cluster as a job of it, and look around."""
        where = self._where
        self.tell(Connect(where.address, where.node_address, where.placement_group))
        return await self.look()

    async def look(self) -> Cluster:
        return await self._ask(Look(), Cluster, _ANSWER_SECONDS)

    async def open_agents(self, request: OpenAgents) -> Agents:
        return await self._ask(request, Agents, request.timeout_seconds + _ANSWER_SECONDS)

    async def digests_of(self, agent: int, name: str, path: str, say: Callable[[int, int], None]) -> dict[str, str]:
        """SHA-256 by file name, of ``name``, the agent's node; ``say`` hears bytes done, in all. Raises ModelError."""
        self._digests[agent], answers = anyio.create_memory_object_stream[FilesDigested](math.inf)
        self.tell(DigestFiles(agent, path))
        async with answers:
            async for answer in answers:
                if answer.problem:
                    raise ModelError(
                        f"{name} could not read {path}: {answer.problem}", hint=f"read it there: sha256sum {path}"
                    )
                if answer.progress.digests is not None:
                    return answer.progress.digests
                say(answer.progress.done_bytes, answer.progress.total_bytes)
        raise self._explain("ended")

    def tell(self, request: ToDriver) -> None:
        """Soon; nothing happens when the process is gone."""
        self._send_request.send_nowait(request)

    async def write(self) -> None:
        async for request in self._requests:
            with suppress(HostUnreachableError):  # whoever reads knows
                await self._driver.send_line(msgspec.json.encode(request).decode())

    async def read(self) -> None:
        """Take its lines until it is gone."""
        while (line := await self._driver.receive_line()) is not None:
            message = self._decoder.decode(line)
            match message:
                case RankEnded():
                    self.on_ended(message)
                case FilesDigested():
                    with suppress(anyio.BrokenResourceError):  # nobody waits for it any more
                        self._digests[message.agent].send_nowait(message)
                case _:
                    await self._send_answer.send(message)
        await self._send_answer.aclose()
        for stream in self._digests.values():
            await stream.aclose()
        self.on_lost(self._last_words("ended"))

    async def _ask(self, request: ToDriver, kind: type[Answer], seconds: float) -> Answer:
        self.tell(request)
        with anyio.move_on_after(seconds):
            try:
                answer = await self._answers.receive()
            except anyio.EndOfStream:
                raise self._explain("ended") from None
            if isinstance(answer, Refused):
                raise self._explain(answer.message)
            assert isinstance(answer, kind)
            return answer
        raise self._explain(f"has not answered within {seconds:g} s")

    def _explain(self, words: str) -> AphroError:
        return AphroError(
            f"the Ray cluster at {self._where.address}: {self._last_words(words)}",
            hint="`aphro cluster status`, or `ray status`: this host must be a node of it, with its token if any",
            exit_code=ExitCode.PLACEMENT,
        )

    def _last_words(self, words: str) -> str:
        """Ray's own, of what it says when it aborts."""
        if words != "ended":
            return words
        said = last_line(self._driver.stderr_tail)
        return f"the process that speaks to Ray {words}{f': {said}' if said else ''}"


@asynccontextmanager
async def open_link(where: RayCluster) -> AsyncIterator[RayLink]:
    """Start that process; Ray is imported there, and nowhere else of ours. Raises UsageError where it is missing,
    PlacementError where this host has left the cluster."""
    _check(where)
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": ""}
    if where.token_path:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": where.token_path}
    async with process.start([sys.executable, "-m", "aphro_core.executor.ray.driver"], environment) as driver:
        link = RayLink(driver, where)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.read)
            tasks.start_soon(link.write)
            yield link
            tasks.cancel_scope.cancel()


def _check(where: RayCluster) -> None:
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "the ray backend needs Ray, which is not installed here",
            hint=f"{sys.executable} -m pip install 'aphro[ray]'",
        )
    if where.address.startswith(_CLOUD):
        raise UsageError(
            f"{where.address} is an address of Ray Client, whose jobs run elsewhere",
            hint="run this on a node of that cluster, with RAY_ADDRESS=IP:6379 or none",
        )
    if where.token_path and not Path(where.token_path).exists():
        raise PlacementError(
            f"this host has left the cluster of {where.address}", hint="`aphro cluster status`, `aphro cluster join`"
        )
