"""A Ray cluster before anything starts in it: which one this process would use, and whether it has room."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from anyio.from_thread import start_blocking_portal

from aphro_core.cluster.membership import Membership, read_membership
from aphro_core.config import Device, RayCluster
from aphro_core.errors import first_cause
from aphro_core.executor.ray.link import open_link
from aphro_core.executor.ray.protocol import Cluster, RayNode, Resource
from aphro_core.executor.ray.room import wait_for_room
from aphro_core.parallel.backend import ClusterKind


class Found(NamedTuple):
    """``membership``: of this host in an aphro cluster, if it is that."""

    kind: ClusterKind
    where: RayCluster | None
    membership: Membership | None = None


def find_cluster() -> Found:
    """The placement group that this process is in, the aphro cluster of this host, the one that RAY_ADDRESS names."""
    inside = _placement_group()
    if inside is not None:
        return Found("placement group", inside)
    membership, address = read_membership(), os.environ.get("RAY_ADDRESS", "")
    if membership is not None:
        where = RayCluster(
            address=membership.head_address,
            node_address=membership.node_address,
            token_path=membership.token_path,
        )
        return Found("aphro cluster", where, membership)
    return Found("Ray cluster", RayCluster(address=address)) if address else Found("", None)


def _placement_group() -> RayCluster | None:
    """Only a program that has imported Ray itself, or was started by it, can be in one."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    group = ray.util.get_current_placement_group()
    if group is None:
        return None
    context = ray.get_runtime_context()
    return RayCluster(address=context.gcs_address, placement_group=group.id.hex())


def look(
    where: RayCluster,
    choose_device: Callable[[list[RayNode]], Device],
    world_size: int,
    say: Callable[[str], None],
    *,
    num_nodes: int,
    seconds: float,
) -> tuple[Cluster, Resource, Device]:
    """The cluster once it has room for the ranks, from any thread. Raises PlacementError where it has not."""

    async def ask() -> tuple[Cluster, Resource, Device]:
        async with open_link(where) as link:
            await link.connect()
            return await wait_for_room(link, choose_device, world_size, say, num_nodes=num_nodes, seconds=seconds)

    try:
        with start_blocking_portal() as portal:  # the caller's thread may have an event loop of its own
            return portal.call(ask)
    except BaseExceptionGroup as group:
        raise first_cause(group) from None
