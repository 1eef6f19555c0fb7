"""Agents on the nodes that have room: opened, asked what is there, and left out where they fail."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import anyio.to_thread

from aphro_core.config import EngineConfig
from aphro_core.errors import ModelError, PlacementError
from aphro_core.executor.host_checks import check_devices, check_files, check_versions
from aphro_core.executor.ray.link import RayLink
from aphro_core.executor.ray.protocol import AgentPlace, AgentReport, OpenAgents
from aphro_core.executor.ray.room import wait_for_room
from aphro_core.executor.ray.seats import Seat, names, seat_ranks
from aphro_core.worker.host_report import report_host

_ROOM_SECONDS: Final = 6.0  # for a node that was lost a moment ago to be back, or another to join; three such are tried
_AGENT_SECONDS: Final = 30.0  # for a node to start a process of Ray and import aphro there


@dataclass(frozen=True)
class Group:
    """Agents that have answered, and which rank each is to start. ``hosts``: their names, by node id."""

    address: str
    agents: list[AgentPlace]
    reports: list[AgentReport]
    seats: list[Seat]
    hosts: dict[str, str]
    fetching: frozenset[str]  # ids of nodes without the model, which are to read ours

    @property
    def nodes_of_ranks(self) -> dict[int, str]:
        """The address of each rank's node."""
        return {rank: seat.node.address for rank, seat in enumerate(self.seats)}


async def open_agents(link: RayLink, config: EngineConfig) -> Group:
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
