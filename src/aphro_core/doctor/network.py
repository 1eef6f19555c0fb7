"""How hosts reach each other: their interfaces, and the address and interface that each uses towards its peers."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import anyio
import msgspec

from aphro_core.doctor.probe import probe
from aphro_core.remote.remote import Host


class Interface(msgspec.Struct, frozen=True):
    name: str
    addresses: list[str]
    is_up: bool
    is_loopback: bool


class Route(msgspec.Struct, frozen=True):
    """``error`` says why there is none; else packets leave from ``address`` by ``interface`` ("" if unknown)."""

    peer: str
    peer_address: str = ""
    address: str = ""
    interface: str = ""
    error: str = ""


class Network(msgspec.Struct, frozen=True):
    """One host's view. ``routes``: to each peer, in the order of the hosts without itself."""

    interfaces: list[Interface]
    routes: list[Route]

    @property
    def outward(self) -> Route | None:
        """The route that other hosts are reached by: the first that leaves by something else than loopback."""
        good = (route for route in self.routes if route.address and not is_loopback(route.address))
        return next(good, None)


async def read_networks(hosts: Sequence[Host]) -> list[Network]:
    """Every host's view of all others, asked at the same time."""
    networks: dict[int, Network] = {}

    async def ask(number: int, host: Host) -> None:
        peers = [peer.address for peer in hosts if peer is not host]
        networks[number] = msgspec.convert(await probe(host, "network", *peers), Network)

    async with anyio.create_task_group() as tasks:
        for number, host in enumerate(hosts):
            tasks.start_soon(ask, number, host)
    return [networks[number] for number in range(len(hosts))]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
