"""Waiting until a Ray cluster has room for the ranks: for nodes that are still to join, and for devices in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import anyio

from aphro_core.config import Device
from aphro_core.errors import PlacementError
from aphro_core.executor.ray.link import RayLink
from aphro_core.executor.ray.protocol import Cluster, RayNode, Resource
from aphro_core.executor.ray.seats import choose_resource, describe, too_few

_LOOK_SECONDS: Final = 0.3
_SAY_SECONDS: Final = 10.0
BUSY_SECONDS: Final = 15.0  # for devices of ranks that have just ended to be free again


async def wait_for_room(
    link: RayLink,
    choose_device: Callable[[list[RayNode]], Device],
    world_size: int,
    say: Callable[[str], None],
    *,
    num_nodes: int = 0,
    seconds: float = 0.0,
    refused: frozenset[str] = frozenset(),
) -> tuple[Cluster, Resource, Device]:
    """The cluster once ``num_nodes`` nodes are in it and it has ``world_size`` free devices.

    Waits ``seconds`` for nodes, and BUSY_SECONDS for devices that are only in use. ``refused``: ids of nodes that have
    failed already. Raises PlacementError that names what is there.
    """
    started = said = anyio.current_time()
    while True:
        cluster = await _look(link, refused)
        device = choose_device(cluster.nodes)
        resource = choose_resource(device, cluster.nodes)
        usable = [node for node in cluster.nodes if node.reachable]
        if len(usable) >= num_nodes and sum(node.free(resource) for node in usable) >= world_size:
            return cluster, resource, device
        has_all = sum(node.total(resource) for node in usable) >= world_size and len(usable) >= num_nodes
        now = anyio.current_time()
        if now - started >= max(seconds, BUSY_SECONDS if has_all else 0.0):
            if len(usable) < num_nodes:
                raise _too_few_nodes(cluster.nodes, resource, num_nodes, seconds)
            raise too_few(cluster.nodes, resource, world_size)
        if now - said >= _SAY_SECONDS or said == started:
            what = f"{len(usable)} of {num_nodes} nodes" if len(usable) < num_nodes else "room"
            say(f"Waiting for {what}: {describe(cluster.nodes, resource)}.")
            said = now
        await anyio.sleep(_LOOK_SECONDS)


async def _look(link: RayLink, refused: frozenset[str]) -> Cluster:
    cluster = await link.look()
    return Cluster(cluster.address, [node for node in cluster.nodes if node.id not in refused])


def _too_few_nodes(nodes: list[RayNode], resource: Resource, num_nodes: int, seconds: float) -> PlacementError:
    found = sum(node.reachable for node in nodes)
    return PlacementError(
        f"--wait-nodes {num_nodes}: {found} nodes are there after {seconds:g} s: {describe(nodes, resource)}",
        hint="`aphro cluster join` on the others, or a longer --wait-timeout",
    )
