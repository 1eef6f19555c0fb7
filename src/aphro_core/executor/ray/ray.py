"""Ranks on the nodes of a Ray cluster: Ray starts an agent on each, and says when a node is gone; ranks speak to us."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
from anyio.abc import SocketStream, TaskGroup

from aphro_core.channel import Channel
from aphro_core.cluster.announce import announced
from aphro_core.cluster.membership import read_membership
from aphro_core.cluster.messages import Model
from aphro_core.config import EngineConfig
from aphro_core.environment import travelling
from aphro_core.errors import AddressError, AphroError, EngineDeadError, ModelError, PlacementError
from aphro_core.executor.group import GroupExecutor, Launched, WorkerChannel, running
from aphro_core.executor.host_checks import check_devices, check_files, check_versions
from aphro_core.executor.ray.admission import Admission, open_admission
from aphro_core.executor.ray.link import RayLink, open_link
from aphro_core.executor.ray.protocol import (
    AgentPlace,
    AgentReport,
    KillRank,
    OpenAgents,
    RankEnded,
    RankStart,
    StartRanks,
)
from aphro_core.executor.ray.room import wait_for_room
from aphro_core.executor.ray.seats import Seat, names, seat_ranks
from aphro_core.executor.served_model import ServedModel, open_served
from aphro_core.messages import codec
from aphro_core.messages.steps import FromWorker, StartWorker, ToWorker, WorkerProgress
from aphro_core.remote.ssh import last_line
from aphro_core.spawn import Spawner
from aphro_core.worker.host_report import report_host

_ROOM_SECONDS: Final = 6.0  # for a node that was lost a moment ago to be back, or another to join; three such are tried
_AGENT_SECONDS: Final = 30.0  # for a node to start a process of Ray and import aphro there
_JOIN_SECONDS: Final = 60.0  # for an agent to connect, from a file system that may be slow
_CLOSE_SECONDS: Final = 1.0  # after a rank's end: its last frames have been read


@dataclass(frozen=True)
class Group:
    """Agents that have answered, and which rank each is to start. ``hosts``: their names, by node id."""

    address: str
    agents: list[AgentPlace]
    reports: list[AgentReport]
    seats: list[Seat]
    hosts: dict[str, str]
    fetching: frozenset[str]  # ids of nodes without the model, which are to read ours


class RayRank:
    """A rank's process as far as it can be seen from here: by what its agent, or Ray, says of it."""

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
        return self._ended is not None and self._ended.exit_code is None

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
            return "closed its channel but has not ended"
        if ended.exit_code is None:
            return f"was lost with its node: {ended.words}"
        if ended.exit_code < 0:
            return f"was killed by signal {-ended.exit_code} ({signal.Signals(-ended.exit_code).name})"
        return f"ended ({last_line(ended.words) or f'exit code {ended.exit_code}'})"

    def close(self) -> None:
        """Its agent ends it, at the latest."""


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
        group = await _open_agents(link, config)
        ranks = [RayRank(rank, link) for rank in range(len(group.seats))]
        _follow(link, ranks)
        channels = await _start_ranks(link, group, ranks)
        for rank, channel in zip(ranks, channels, strict=True):
            tasks.start_soon(_close_after_end, rank, channel)

        async def launch(rank: int) -> Launched:
            host = group.hosts[group.seats[rank].node.id]
            return Launched(ranks[rank], channels[rank], _start_message(config, rank, group, model), host)

        with open_served(config.model.path, [group.hosts[node] for node in sorted(group.fetching)]) as model:
            async with running(GroupExecutor(config, launch, on_progress, model), beats=True) as executor:
                with ExitStack() as announcement:
                    await anyio.to_thread.run_sync(_announce, announcement, config, group)
                    yield executor
        tasks.cancel_scope.cancel()


def _follow(link: RayLink, ranks: Sequence[RayRank]) -> None:
    """Let every rank know its end, also when nobody can tell it any more."""

    def end_all(words: str) -> None:
        for rank, process in enumerate(ranks):
            process.end(RankEnded(rank, None, words))

    link.on_ended = lambda ended: ranks[ended.rank].end(ended)
    link.on_lost = end_all


async def _open_agents(link: RayLink, config: EngineConfig) -> Group:
    """Where a node fails, another takes its place; refuses only what is wrong with the ones that answer."""
    parallel, refused = config.parallel, frozenset[str]()
    failures: list[str] = []
    while True:
        try:
            cluster, resource, _ = await wait_for_room(
                link, lambda nodes: config.device, parallel.world_size, _say, seconds=_ROOM_SECONDS, refused=refused
            )
        except PlacementError as error:
            message = f"{error.message}; {'; '.join(failures)}" if failures else error.message
            raise PlacementError(message, hint=error.hint) from error
        tp_size, pp_size = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        places, seats = seat_ranks(cluster.nodes, resource, tp_size, pp_size)
        answer = await link.open_agents(OpenAgents(places, config.model.path, _AGENT_SECONDS))
        hosts = names(cluster.nodes)
        failed = {place.node: why for place, why in zip(places, answer.failures, strict=True) if why}
        if not failed:
            reports = [report for report in answer.reports if report is not None]
            fetching = await anyio.to_thread.run_sync(_check, config, hosts, places, reports)
            return Group(cluster.address, places, reports, seats, hosts, fetching)
        failures += [f"{hosts[node]} {why}" for node, why in failed.items()]
        _say(f"{failures[-1]}; trying without it.")
        refused |= set(failed)


def _check(
    config: EngineConfig, hosts: Mapping[str, str], places: Sequence[AgentPlace], reports: Sequence[AgentReport]
) -> frozenset[str]:
    """The nodes that lack the model, if they may fetch it. Raises PlacementError or ModelError for what may not be."""
    path, fetching = config.model.path, set[str]()
    ours = report_host(path)
    for place, report in zip(places, reports, strict=True):
        name = hosts[place.node]
        check_versions(name, report.host, ours)
        check_devices(name, report.host, place.num_ranks, config.device)
        try:
            check_files(name, path, report.host.files, ours.files)
        except ModelError:
            if config.model.model_from != "head":
                raise
            fetching.add(place.node)
    return frozenset(fetching)


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


async def _close_after_end(rank: RayRank, channel: WorkerChannel) -> None:
    """Where a node is gone nothing says so on the channel itself."""
    await rank.wait()
    await anyio.sleep(_CLOSE_SECONDS)
    await channel.aclose()


def _announce(stack: ExitStack, config: EngineConfig, group: Group) -> None:
    """Let `aphro cluster status` name the model, where this is an aphro cluster."""
    here = read_membership()
    if here is None or config.parallel.ray is None or here.head_address != config.parallel.ray.address:
        return
    ranks = {rank: seat.node.address for rank, seat in enumerate(group.seats)}
    try:
        stack.enter_context(
            announced(here, Model(config.model.served_name, config.parallel.ray.url, group.address, ranks))
        )
    except AphroError as error:  # nobody's request depends on it
        _say(f"`aphro cluster status` will not name this model: {error.message}")


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
        source=model.source if model and seat.node.id in group.fetching else None,
        peers=sorted({each.node.address for each in group.seats} - {seat.node.address}),
        log_file=str(Path(report.log_dir) / f"rank-{rank}.log") if report.log_dir else "",
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
