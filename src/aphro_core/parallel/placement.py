"""Ranks to hosts: the ranks of a tensor-parallel group share a host wherever one has room for them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from aphro_core.errors import PlacementError


class Place(NamedTuple):
    host: int  # index
    device: int  # index on that host


def place_ranks(num_slots: Sequence[int], tp_size: int, pp_size: int) -> list[Place]:
    """The place of each rank (rank = pp_rank * tp_size + tp_rank), given each host's number of devices.

    Stage by stage: the first host with ``tp_size`` free devices; where none has, free devices in the hosts' order.
    Raises PlacementError for too few devices.
    """
    world_size, total = tp_size * pp_size, sum(num_slots)
    if world_size > total:
        raise PlacementError(
            f"World size ({world_size}) is larger than the number of devices of the hosts ({total}): tensor parallel "
            f"{tp_size} x pipeline parallel {pp_size} needs one device a rank",
            hint=f"{world_size - total} more devices in --hosts, or a smaller -tp or -pp",
        )
    used = [0] * len(num_slots)
    places: list[Place] = []
    for _ in range(pp_size):
        roomy = next((i for i, slots in enumerate(num_slots) if slots - used[i] >= tp_size), None)
        for _ in range(tp_size):
            host = roomy if roomy is not None else next(i for i, slots in enumerate(num_slots) if used[i] < slots)
            places.append(Place(host, used[host]))
            used[host] += 1
    return places


def near_groups(hosts: Sequence[Hashable], tp_size: int) -> list[bool]:
    """Of each tensor-parallel group whether its ranks share a host, given the host of each rank. GPUs sum by each
    other's memory then, else by NCCL (distributed/peer_meeting.py asks the ranks themselves)."""
    return [len(set(hosts[start : start + tp_size])) == 1 for start in range(0, len(hosts), tp_size)]


def splits_a_group(hosts: Sequence[Hashable], tp_size: int) -> bool:
    """Whether some tensor-parallel group spans hosts: each of its sums then waits for the network."""
    return not all(near_groups(hosts, tp_size))
