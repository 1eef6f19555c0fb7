"""This host's network interfaces: their addresses, and which of them leads to a peer. No command is run for it."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple

_SIOCGIFADDR: Final = 0x8915


class Way(NamedTuple):
    """Packets to ``peer_address`` leave from ``address`` by ``interface``, "" if that is unknown."""

    peer_address: str
    address: str
    interface: str


def way_to(peer: str) -> Way:
    """The kernel says it when a datagram socket is connected; nothing is sent. Raises OSError without a route."""
    family, kind, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as asked:
        asked.connect(target)
        address = str(asked.getsockname()[0])
    interface = next((name for _, name in socket.if_nameindex() if address in addresses_of(name)), "")
    return Way(str(target[0]), address, interface)


def addresses_of(interface: str) -> list[str]:
    """Its IPv4 address, then those of IPv6."""
    answer = ask_about(interface, _SIOCGIFADDR)
    ipv4 = [socket.inet_ntoa(answer[20:24])] if answer else []
    try:
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    except OSError:
        return ipv4
    return ipv4 + [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])) for row in rows if row[5] == interface]


def ask_about(interface: str, request: int) -> bytes:
    """The kernel's ``struct ifreq`` for an interface, b"" where it has no answer (netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            return fcntl.ioctl(asked.fileno(), request, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return b""
