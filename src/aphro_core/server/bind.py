"""The listening sockets, taken before anything loads: an address that cannot be had is refused by name at once."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Final

from aphro_core.errors import AddressError
from aphro_core.listeners import holder_of

BACKLOG: Final = 2048  # connections that wait to be accepted: a burst must not be refused by the kernel
UNREAD_SECONDS: Final = 60.0  # a client that reads nothing for so long is cut off, by the kernel
_PORTS_TRIED: Final = 20  # for the hint

Address = tuple[socket.AddressFamily, tuple[Any, ...]]


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of ``host`` (``localhost`` has two); port 0 takes any free one.

    They listen from now on, so that the port is ours while the model loads. ``::`` takes IPv4 too. Raises AddressError.
    """
    addresses = _resolve(host, port)
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, address in addresses:
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                sock = _listen(family, (address[0], chosen, *address[2:]))
            except OSError as error:
                # a name may stand for an address that this host does not have, ::1 in many containers
                if error.errno == errno.EADDRNOTAVAIL and (sockets or len(addresses) > 1):
                    continue
                raise _explain(error, host, chosen) from error
            sockets.append(opened.enter_context(sock))
        if not sockets:
            raise _not_ours(host)
        opened.pop_all()
        return sockets


def url_of(sockets: Sequence[socket.socket]) -> str:
    """``http://127.0.0.1:2242``, or ``http://[::1]:2242``."""
    host, port = sockets[0].getsockname()[:2]
    return f"http://{render_address(host, port)}"


def render_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolve(host: str, port: int) -> list[Address]:
    if not 0 <= port <= 65535:
        raise AddressError(f"port is {port}, allowed: 1 to 65535, or 0 for any free one", hint="--port 2242")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a host name"
        raise AddressError(f"the host {host!r} has no address: {reason}", hint="--host 127.0.0.1") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _listen(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart does not wait for old connections
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited: a token is not held back
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_SECONDS * 1000))
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _explain(error: OSError, host: str, port: int) -> AddressError:
    where = render_address(host, port)
    match error.errno:
        case errno.EADDRINUSE:
            holder = holder_of(port)
            free = next(_free_ports(host, port), 0)
            return AddressError(f"{where} is in use{f' by {holder}' if holder else ''}", hint=f"--port {free}")
        case errno.EACCES:
            return AddressError(f"{where} needs more rights than this user has", hint="--port 2242")
        case errno.EADDRNOTAVAIL:
            return _not_ours(host)
        case _:
            return AddressError(f"{where} cannot be bound: {error.strerror}", hint="--host 127.0.0.1 --port 2242")


def _not_ours(host: str) -> AddressError:
    message = f"{host} is not an address of this machine"
    return AddressError(message, hint="--host 127.0.0.1 for this machine alone, --host 0.0.0.0 for all its addresses")


def _free_ports(host: str, port: int) -> Iterator[int]:
    """Higher ports of the same address that can be had now."""
    family, address = _resolve(host, port)[0]
    for candidate in range(port + 1, min(port + 1 + _PORTS_TRIED, 65536)):
        try:
            _listen(family, (address[0], candidate, *address[2:])).close()
        except OSError:
            continue
        yield candidate
