"""Where the ranks of the live check run, and by which address and interface they meet."""

from __future__ import annotations

from collections.abc import Sequence

from aphro_core.doctor.live.ranks import Place
from aphro_core.doctor.network import read_networks
from aphro_core.errors import AphroError
from aphro_core.remote.remote import Host

_LOOPBACK = "127.0.0.1"


async def choose_places(hosts: Sequence[Host], devices: Sequence[Sequence[str]]) -> list[Place]:
    """A place for each of ``devices[i]`` on ``hosts[i]``. Raises AphroError for a host without a way to the others.

    On one host ranks meet on loopback, and Gloo and NCCL choose as they would in an engine. Between hosts it is the
    route to the peers that decides: which address a host has there, and which interface.
    """
    if len(hosts) == 1:
        return [Place(hosts[0], device, _LOOPBACK, None) for device in devices[0]]
    places = []
    for host, network, names in zip(hosts, await read_networks(hosts), devices, strict=True):
        route = network.outward
        if route is None:
            errors = "; ".join(f"{other.peer}: {other.error or 'loopback'}" for other in network.routes)
            raise AphroError(
                f"{host.name or 'this host'} has no route to the other hosts ({errors})",
                hint="name hosts by addresses that every one of them can reach, and look at `ip route`",
            )
        places += [Place(host, device, route.address, route.interface or None) for device in names]
    return places
