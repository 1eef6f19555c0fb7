"""Run on a host: its interfaces, and by which of them and from which address the route to each peer leaves. JSON."""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import sys
from pathlib import Path
from typing import Any, Final

_SIOCGIFADDR: Final = 0x8915
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 1
_IFF_LOOPBACK: Final = 8


def interfaces() -> list[dict[str, Any]]:
    """Name, addresses and flags of each interface, without any command: containers often have no `ip`."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            flags = struct.unpack_from("H", _ioctl(asked, _SIOCGIFFLAGS, request) or bytes(18), 16)[0]
            answer = _ioctl(asked, _SIOCGIFADDR, request)
            ipv4 = [socket.inet_ntoa(answer[20:24])] if answer else []
            addresses = [*ipv4, *_ipv6_addresses(name)]
            is_up, is_loopback = bool(flags & _IFF_UP), bool(flags & _IFF_LOOPBACK)
            found.append({"name": name, "addresses": addresses, "is_up": is_up, "is_loopback": is_loopback})
    return found


def route(peer: str, known: list[dict[str, Any]]) -> dict[str, Any]:
    """Where packets to ``peer`` leave: the kernel says it when a datagram socket is connected; nothing is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as asked:
            asked.connect(target)
            address = str(asked.getsockname()[0])
    except OSError as error:
        return {"peer": peer, "error": f"{error.strerror or error}"}
    interface = next((entry["name"] for entry in known if address in entry["addresses"]), "")
    return {"peer": peer, "peer_address": target[0], "address": address, "interface": interface}


def _ioctl(asked: socket.socket, request: int, argument: bytes) -> bytes:
    try:
        return fcntl.ioctl(asked.fileno(), request, argument)
    except OSError:
        return b""


def _ipv6_addresses(name: str) -> list[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    rows = [line.split() for line in lines]
    return [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])) for row in rows if row[5] == name]


if __name__ == "__main__":
    everything = interfaces()
    print(json.dumps({"interfaces": everything, "routes": [route(peer, everything) for peer in sys.argv[1:]]}))
