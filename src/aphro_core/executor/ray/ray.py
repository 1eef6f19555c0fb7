"""Ranks on the nodes of a Ray cluster: Ray starts an agent on each, and says when a node is gone; ranks speak to us."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
from anyio.abc import SocketStream, TaskGroup

from aphro_core.channel import Channel
from aphro_core.config import EngineConfig
from aphro_core.environment import travelling
from aphro_core.errors import AddressError, EngineDeadError
from aphro_core.executor.group import GroupExecutor, running
from aphro_core.executor.rank import Launched, WorkerChannel
from aphro_core.executor.ray.admission import Admission, open_admission
from aphro_core.executor.ray.agents import Group, open_agents
from aphro_core.executor.ray.link import RayLink, open_link
from aphro_core.executor.ray.naming import announce
from aphro_core.executor.ray.protocol import RankStart, StartRanks
from aphro_core.executor.ray.rank import RayRank, close_after_end, follow
from aphro_core.executor.served_model import ServedModel, open_served
from aphro_core.executor.verify import OtherHost, verify_full
from aphro_core.messages import codec
from aphro_core.messages.steps import FromWorker, StartWorker, ToWorker, WorkerProgress
from aphro_core.parallel.placement import splits_a_group
from aphro_core.spawn import Spawner

_JOIN_SECONDS: Final = 60.0  # for an agent to connect, from a file system that may be slow


@asynccontextmanager
async def open_ray(
    config: EngineConfig, spawner: Spawner | None, on_progress: Callable[[WorkerProgress], None]
) -> AsyncIterator[GroupExecutor]:
    """Find room, look at every node, start the ranks, load the weights. Nothing of it is left when the block is left.

    Raises PlacementError or ModelError for nodes that cannot take part, AphroError with Ray's words for the cluster.
    """
    assert config.parallel.ray is not None
    async with open_link(config.parallel.ray) as link, anyio.create_task_group() as tasks:
        await link.connect()
        group = await open_agents(link, config)
        if config.model.verify == "full":
            await verify_full(list(_others(link, group, config.model.path)), config.model.path, on_progress)
        ranks = [RayRank(rank, link) for rank in range(len(group.seats))]
        follow(link, ranks)
        channels = await _start_ranks(link, group, ranks)
        for rank, channel in zip(ranks, channels, strict=True):
            tasks.start_soon(close_after_end, rank, channel)

        async def launch(rank: int) -> Launched:
            host = group.hosts[group.seats[rank].node.id]
            return Launched(ranks[rank], channels[rank], _start_message(config, rank, group, model), host)

        with open_served(config.model.path, [group.hosts[node] for node in sorted(group.fetching)]) as model:
            async with running(GroupExecutor(config, launch, on_progress, model), beats=True) as executor:
                with ExitStack() as announcement:
                    await anyio.to_thread.run_sync(announce, announcement, config, group.address, group.nodes_of_ranks)
                    yield executor
        tasks.cancel_scope.cancel()


def _others(link: RayLink, group: Group, path: str) -> Iterator[OtherHost]:
    """One agent of each node with files to compare: not this host's, nor of those that fetch the model."""
    seen = set(group.fetching)
    for rank, seat in enumerate(group.seats):
        node = seat.node
        if node.id not in seen and node.address != group.address:
            seen.add(node.id)
            yield OtherHost(
                group.hosts[node.id], rank, partial(link.digests_of, seat.agent, group.hosts[node.id], path)
            )


async def _start_ranks(link: RayLink, group: Group, ranks: Sequence[RayRank]) -> list[WorkerChannel]:
    keys = {rank: secrets.token_bytes(32) for rank in range(len(ranks))}
    try:
        async with open_admission(group.address, keys) as admission:
            starts = [
                RankStart(rank, seat.agent, group.address, admission.port, keys[rank].hex())
                for rank, seat in enumerate(group.seats)
            ]
            link.tell(StartRanks(starts))
            return [await _take_rank(admission, group, rank, process) for rank, process in enumerate(ranks)]
    except OSError as error:
        raise AddressError(f"no port for the ranks can be opened at {group.address}: {error}") from error


async def _take_rank(admission: Admission, group: Group, rank: int, process: RayRank) -> WorkerChannel:
    """Its channel; or why there is none."""
    streams: list[SocketStream] = []

    async def take(tasks: TaskGroup) -> None:
        streams.append(await admission.wait(rank))
        tasks.cancel_scope.cancel()

    with anyio.move_on_after(_JOIN_SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take, tasks)
            await process.wait()
            tasks.cancel_scope.cancel()
    if streams:
        return Channel[ToWorker, FromWorker](streams[0], codec.engine_side_of_worker())
    why = process.describe_end() if process.poll() else f"has not connected within {_JOIN_SECONDS:g} s"
    raise EngineDeadError(
        f"rank {rank} on {group.hosts[group.seats[rank].node.id]} {why}",
        hint=f"that node must reach {group.address} by TCP, at any port: look for a firewall between them",
    )


def _start_message(config: EngineConfig, rank: int, group: Group, model: ServedModel | None) -> StartWorker:
    seat = group.seats[rank]
    report = group.reports[seat.agent]
    num_ranks = Counter(each.node.id for each in group.seats)[seat.node.id]
    environment = travelling(os.environ) | report.environment | config.parallel.environment
    if config.device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(max(1, report.host.num_cores // num_ranks)))
    return StartWorker(
        config=config,
        rank=rank,
        local_rank=seat.device,
        store="",
        memory_bytes=int(report.host.memory_bytes * config.cache.cpu_memory_utilization / num_ranks),
        environment=environment,
        address=seat.node.address,
        measures_links=splits_a_group([each.node.id for each in group.seats], config.parallel.tensor_parallel_size),
        source=model.source if model and seat.node.id in group.fetching else None,
        peers=sorted({each.node.address for each in group.seats} - {seat.node.address}),
        log_file=str(Path(report.log_dir) / f"rank-{rank}.log") if report.log_dir else "",
        num_ranks_here=num_ranks,
    )
