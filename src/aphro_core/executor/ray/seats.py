"""Which node of a Ray cluster takes which rank, and what to say where there are not enough of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aphro_core.config import Device
from aphro_core.errors import PlacementError
from aphro_core.executor.ray.protocol import AgentPlace, RayNode, Resource
from aphro_core.parallel.placement import place_ranks


@dataclass(frozen=True)
class Seat:
    """``agent``: index into the agents. ``device``: of those that this agent has."""

    node: RayNode
    agent: int
    device: int


def choose_resource(device: Device, nodes: Sequence[RayNode]) -> Resource:
    """What a rank takes one of: a GPU; a slot where any node offers them, as aphro's clusters do; else a CPU."""
    if device == "cuda":
        return "GPU"
    return "aphro_slot" if any(node.total("aphro_slot") for node in nodes) else "CPU"


def seat_ranks(
    nodes: Sequence[RayNode], resource: Resource, tp_size: int, pp_size: int
) -> tuple[list[AgentPlace], list[Seat]]:
    """One agent for each node, or bundle of a placement group, that takes ranks; and the seat of each rank.

    The ranks of a tensor-parallel group share a node wherever one has room. Raises PlacementError for too few devices.
    """
    usable = [node for node in nodes if node.reachable]
    places = place_ranks([node.free(resource) for node in usable], tp_size, pp_size)
    taken = {(place.host, place.device) for place in places}
    agents: list[AgentPlace] = []
    seats: dict[tuple[int, int], Seat] = {}
    for host, node in enumerate(usable):
        first = 0
        for offer in node.offers:
            num_free = offer.free.get(resource, 0)
            devices = [device for device in range(first, first + num_free) if (host, device) in taken]
            first += num_free
            if devices:
                seats |= {(host, device): Seat(node, len(agents), i) for i, device in enumerate(devices)}
                agents.append(AgentPlace(node.id, offer.bundle, resource, len(devices)))
    return agents, [seats[place] for place in places]


def names(nodes: Sequence[RayNode]) -> dict[str, str]:
    """By id: the host's name, or its address where several have the same."""
    hostnames = [node.hostname for node in nodes]
    return {
        node.id: node.hostname if node.hostname and hostnames.count(node.hostname) == 1 else node.address
        for node in nodes
    }


def describe(nodes: Sequence[RayNode], resource: Resource) -> str:
    """``node0 (10.0.0.1): 1 of 2 free, node1 (10.0.0.2): does not answer``."""
    named = names(nodes)
    said = (
        f"{named[node.id]} ({node.address}): "
        + (f"{node.free(resource)} of {node.total(resource)} free" if node.reachable else "does not answer")
        for node in nodes
    )
    return ", ".join(said) or "no node"


def too_few(nodes: Sequence[RayNode], resource: Resource, world_size: int) -> PlacementError:
    usable = [node for node in nodes if node.reachable]
    found, total = sum(node.free(resource) for node in usable), sum(node.total(resource) for node in usable)
    what = {"GPU": "GPUs", "aphro_slot": "slots for ranks (aphro_slot)", "CPU": "CPUs"}[resource]
    busy = f", {total - found} more are in use" if total > found else ""
    return PlacementError(
        f"World size ({world_size}) is larger than the number of free {what} in the cluster ({found}{busy}): "
        f"{describe(nodes, resource)}",
        hint=f"`aphro cluster join` on another host, a smaller -tp or -pp, or --wait-nodes {len(nodes) + 1}",
    )
