"""Whether the hosts of a group reach each other, before Gloo or NCCL would wait minutes for it: a connection a pair.

Every host listens on a free port of the address that its collectives use, as they will, and connects to all others.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import msgspec

from aphro_core.errors import AphroError, ExitCode
from aphro_core.interfaces import addresses_of, way_to

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_CONNECT_SECONDS: Final = 5.0
_DONE_SECONDS: Final = 2 * _CONNECT_SECONDS  # from the end of our own connections to that of the others'
_HELLO: Final = b"aphro: reached"
_VARIABLES: Final = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class Door(msgspec.Struct, frozen=True):
    """Where a host listens."""

    host: str
    address: str
    port: int
    interface: str


def check_interfaces(environment: Mapping[str, str]) -> None:
    """Raises AphroError for a variable that names interfaces of which this host has none."""
    have = [name for _, name in socket.if_nameindex()]
    for variable in _VARIABLES:
        value = environment.get(variable, "")
        if value.startswith("^") or not value:
            continue
        names = value.removeprefix("=").split(",")
        is_exact = value.startswith("=") or variable.startswith("GLOO")
        if not any(name == each if is_exact else name.startswith(each) for each in names for name in have):
            raise AphroError(
                f"{socket.gethostname()} has no interface {value.removeprefix('=')} ({variable}); it has "
                f"{', '.join(sorted(have))}",
                hint=f"unset {variable}: the interface is then that of the route to the other hosts",
                exit_code=ExitCode.PLACEMENT,
            )


def check_paths(store: Store, ours: str, peers: list[str], environment: Mapping[str, str], variable: str) -> None:
    """For one rank of each host: ``ours`` is its address as the others know it, from their ``peers``.

    ``variable`` of ``environment`` names the interface of its collectives. Raises AphroError that names both hosts, the
    interface and what happened; RuntimeError when a host does not come.
    """
    address, interface = _own_address(peers[0], environment.get(variable, "").removeprefix("="))
    with socket.create_server((address, 0), family=_family(address), backlog=len(peers) + 8) as listener:
        door = Door(socket.gethostname(), address, listener.getsockname()[1], interface)
        threading.Thread(target=_welcome, args=(listener,), name="paths", daemon=True).start()
        store.set(f"path/{ours}", msgspec.json.encode(door).decode())
        doors = [msgspec.json.decode(store.get(f"path/{peer}"), type=Door) for peer in peers]
        with ThreadPoolExecutor(len(doors), "paths") as pool:
            for peer, other, problem in zip(peers, doors, pool.map(_try, doors), strict=True):
                if problem:
                    asked = variable if environment.get(variable) else ""
                    raise _no_path(door, other, problem, asked, way_to(peer).interface)
        store.set(f"path-done/{ours}", "1")
        with suppress(RuntimeError):  # a host that has found a problem says so itself
            store.wait([f"path-done/{peer}" for peer in peers], timedelta(seconds=_DONE_SECONDS))


def _own_address(peer: str, interface: str) -> tuple[str, str]:
    """(the address that collectives listen on, its interface)."""
    if interface and (found := addresses_of(interface)):
        return found[0], interface
    way = way_to(peer)
    return way.address, way.interface


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _welcome(listener: socket.socket) -> None:
    """Until the listener is closed."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(_HELLO)


def _try(door: Door) -> str:
    """What is wrong with the way there, "" if nothing is."""
    try:
        with socket.create_connection((door.address, door.port), timeout=_CONNECT_SECONDS) as connection:
            return "" if connection.recv(len(_HELLO), socket.MSG_WAITALL) == _HELLO else "somebody else answers there"
    except TimeoutError:
        return f"nothing comes back within {_CONNECT_SECONDS:g} s"
    except OSError as error:
        return error.strerror or str(error)


def _no_path(own: Door, other: Door, problem: str, asked: str, by_route: str) -> AphroError:
    """``asked``: the variable that chose our interface, "" if none; ``by_route``: the one that leads to the other."""
    where = f"{other.address} port {other.port}" + (f" ({other.interface})" if other.interface else "")
    hint = f"open TCP between {own.host} and {other.host} on free ports (nft list ruleset, on both)"
    if asked and own.interface != by_route:
        hint = f"unset {asked}: the route to {other.host} is by {by_route or 'another interface'}"
    elif asked:
        hint = f"unset {asked}, or {hint}"
    return AphroError(
        f"{own.host} does not reach {other.host} at {where}: {problem}", hint=hint, exit_code=ExitCode.PLACEMENT
    )
