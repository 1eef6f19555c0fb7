"""Run on a host: its interfaces, and by which of them and from which address the route to each peer leaves. JSON."""

from __future__ import annotations

import json
import socket
import struct
import sys
from typing import Any, Final

from aphro_core.interfaces import addresses_of, ask_about, way_to

_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 1
_IFF_LOOPBACK: Final = 8


def interfaces() -> list[dict[str, Any]]:
    """Name, addresses and flags of each interface, without any command: containers often have no `ip`."""
    found = []
    for _, name in socket.if_nameindex():
        flags = struct.unpack_from("H", ask_about(name, _SIOCGIFFLAGS) or bytes(18), 16)[0]
        is_up, is_loopback = bool(flags & _IFF_UP), bool(flags & _IFF_LOOPBACK)
        found.append({"name": name, "addresses": addresses_of(name), "is_up": is_up, "is_loopback": is_loopback})
    return found


def route(peer: str) -> dict[str, Any]:
    try:
        return {"peer": peer, **way_to(peer)._asdict()}
    except OSError as error:
        return {"peer": peer, "error": f"{error.strerror or error}"}


if __name__ == "__main__":
    print(json.dumps({"interfaces": interfaces(), "routes": [route(peer) for peer in sys.argv[1:]]}))
