"""Ranks on several hosts: each started over ssh, its channel the connection's stdio; no port listens for it."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import msgspec

from aphro_core.channel import Channel
from aphro_core.checkpoint.digests import DigestProgress
from aphro_core.config import EngineConfig
from aphro_core.environment import travelling
from aphro_core.errors import ModelError
from aphro_core.executor.group import GroupExecutor, running
from aphro_core.executor.nodes import Node, Nodes, open_nodes
from aphro_core.executor.rank import Launched
from aphro_core.executor.served_model import ServedModel, open_served
from aphro_core.executor.verify import OtherHost, Say, verify_full
from aphro_core.messages import codec
from aphro_core.messages.steps import FromWorker, StartWorker, ToWorker, WorkerProgress
from aphro_core.parallel.placement import splits_a_group
from aphro_core.remote.local import LocalHost
from aphro_core.remote.remote import Host, Process
from aphro_core.remote.ssh import SSH_FAILED, last_line
from aphro_core.spawn import Spawner


class RemoteProcess:
    """A rank's process as far as it can be seen from here: by the command that started it."""

    was_short = False  # not known of another host

    def __init__(self, process: Process, host: Host) -> None:
        self._process = process
        self._host = host

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    @property
    def is_lost(self) -> bool:
        """ssh ends in this way, too, when the rank was killed by a signal: only then its connection is still there."""
        return self.exit_code == SSH_FAILED and not self._host.is_connected

    def poll(self) -> bool:
        return self.exit_code is not None

    async def wait(self) -> None:
        await self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """To what runs here: when ssh ends, the rank's input closes, which is its sign to end."""
        if number == signal.SIGKILL:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def describe_end(self) -> str:
        if self.exit_code is None:
            return "closed its channel but has not ended"
        if self.exit_code == SSH_FAILED and not self.is_lost:
            return "was killed by a signal"
        return f"ended ({last_line(self._process.stderr_tail) or f'exit code {self.exit_code}'})"

    def close(self) -> None:
        """Its block ends it."""


@asynccontextmanager
async def open_ssh(
    config: EngineConfig, spawner: Spawner | None, on_progress: Callable[[WorkerProgress], None]
) -> AsyncIterator[GroupExecutor]:
    """Look at the hosts, start the ranks, load the weights. Nothing of it is left anywhere when the block is left.

    Raises HostUnreachableError, PlacementError or ModelError for a host that cannot take part.
    """
    async with AsyncExitStack() as stack:
        nodes = await open_nodes(stack, config)
        if config.model.verify == "full":
            await verify_full(list(_others(nodes, config.model.path)), config.model.path, on_progress)
        names = [node.slots.name for node in nodes.by_index.values() if node.fetches]
        model = stack.enter_context(open_served(config.model.path, names))

        async def launch(rank: int) -> Launched:
            node = nodes.by_index[nodes.places[rank].host]
            start = _start_message(config, rank, nodes, model)
            process = await stack.enter_async_context(
                node.host.start(node.host.python, "-m", "aphro_core.worker.remote_entry")
            )
            channel = Channel[ToWorker, FromWorker](process.stream, codec.engine_side_of_worker())
            return Launched(RemoteProcess(process, node.host), channel, start, node.slots.name)

        async with running(GroupExecutor(config, launch, on_progress, model), beats=True) as executor:
            yield executor


def _others(nodes: Nodes, path: str) -> Iterator[OtherHost]:
    """Those with files to compare: not this host, nor those that fetch the model."""
    for index, node in nodes.by_index.items():
        if not (node.fetches or isinstance(node.host, LocalHost)):
            rank = next(rank for rank, place in enumerate(nodes.places) if place.host == index)
            yield OtherHost(node.slots.name, rank, partial(_digests_of, node, path))


async def _digests_of(node: Node, path: str, say: Say) -> dict[str, str]:
    async with node.host.start(node.host.python, "-m", "aphro_core.checkpoint.digests", path) as process:
        while (line := await process.receive_line()) is not None:
            try:
                progress = msgspec.json.decode(line, type=DigestProgress)
            except msgspec.MsgspecError:
                continue  # a login script that speaks
            if progress.digests is not None:
                return progress.digests
            say(progress.done_bytes, progress.total_bytes)
        raise ModelError(
            f"{node.slots.name} could not read {path}: {process.stderr_tail or 'its process ended'}",
            hint=f"read it there: sha256sum {path}",
        )


def _start_message(config: EngineConfig, rank: int, nodes: Nodes, model: ServedModel | None) -> StartWorker:
    place = nodes.places[rank]
    node, num_ranks = nodes.by_index[place.host], nodes.num_ranks(place.host)
    environment = travelling(os.environ) | config.parallel.environment
    if config.device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(max(1, node.report.num_cores // num_ranks)))
    return StartWorker(
        config=config,
        rank=rank,
        local_rank=place.device,
        store="",
        memory_bytes=int(node.report.memory_bytes * config.cache.cpu_memory_utilization / num_ranks),
        environment=environment,
        peers=[other.host.address for i, other in nodes.by_index.items() if i != place.host],
        address=node.host.address,
        measures_links=splits_a_group([each.host for each in nodes.places], config.parallel.tensor_parallel_size),
        source=model.source if model and node.fetches else None,
        num_ranks_here=num_ranks,
    )
