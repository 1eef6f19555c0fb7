"""The address that other hosts reach this one by: chosen by route or by hand, and refused where it cannot be."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aphro_core.errors import UsageError
from aphro_core.interfaces import addresses_of, way_to

_ANYWHERE: Final = "203.0.113.1"  # of the range for documentation (RFC 5737): the default route leads there
_BRIDGE: Final = re.compile(r"docker\d|br-[0-9a-f]{6}|virbr|veth|flannel|cni\d|cali|podman|lx[cd]|kube", re.IGNORECASE)
_TUNNEL: Final = re.compile(r"tun\d|tap\d|wg\d|tailscale|zt\w{4}|nordlynx|vpn", re.IGNORECASE)
_CONTAINER_MARKS: Final = (Path("/.dockerenv"), Path("/run/.containerenv"))


@dataclass(frozen=True, slots=True)
class Chosen:
    """``address`` on ``interface``, because of ``reason``; ``others`` is what else this host has."""

    address: str
    interface: str
    reason: str
    others: tuple[str, ...] = ()
    warning: str = ""

    def __str__(self) -> str:
        rest = f"; not {', '.join(self.others)}" if self.others else ""
        return f"{self.address} on {self.interface}: {self.reason}{rest}"


def own_addresses() -> dict[str, str]:
    """Address -> interface, without link-local ones; loopback first."""
    names = sorted((name for _, name in socket.if_nameindex()), key=lambda name: (name != "lo", name))
    found = {address: name for name in names for address in addresses_of(name)}
    return {address: name for address, name in found.items() if not ipaddress.ip_address(address).is_link_local}


def kind_of(interface: str) -> str:
    """ "" for a card that may lead to other hosts, else what it is."""
    if interface == "lo":
        return "loopback"
    if _BRIDGE.match(interface):
        return "a container bridge"
    return "a tunnel" if _TUNNEL.match(interface) else ""


def choose_address(*, advertise: str | None, interface: str | None, peer: str | None) -> Chosen:
    """``advertise`` or ``interface`` as typed, else the route to ``peer`` (the head), else the default route.

    Raises UsageError that names the address, and those that would do.
    """
    own = own_addresses()
    if advertise is not None:
        chosen = _typed_address(advertise, interface, own)
    elif interface is not None:
        chosen = _typed_interface(interface, own)
    else:
        chosen = _by_route(peer, own)
    kind = kind_of(chosen.interface)
    if kind and ((advertise is None and interface is None) or kind != "a tunnel"):
        raise UsageError(
            f"other hosts cannot reach {chosen.address}: {chosen.interface} is {kind} of this host", hint=_which(own)
        )
    others = tuple(_describe(address, name) for address, name in own.items() if name not in ("lo", chosen.interface))
    warning = ""
    if _is_inside_container(chosen.interface):
        warning = f"{chosen.interface} is this container's own network: other hosts reach it only with --network host"
    return Chosen(chosen.address, chosen.interface, chosen.reason, others, warning)


def check_head(address: str) -> None:
    """Refuse as ``--head`` what is on this host. Raises UsageError."""
    own = own_addresses()
    hint = "the address that `aphro cluster up` printed on the head: aphro cluster join --head IP"
    if ipaddress.ip_address(address).is_loopback or ipaddress.ip_address(address).is_unspecified:
        raise UsageError(f"--head {address} is this host itself, for every host", hint=hint)
    if address in own:
        kind = kind_of(own[address])
        is_what = f"{own[address]}, {kind}" if kind else own[address]
        raise UsageError(f"--head {address} is this host's own address ({is_what}), not the head's", hint=hint)


def resolve(host: str) -> str:
    """An address as it is, a name as the resolver has it. Raises UsageError."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UsageError(f"--head {host}: {error.strerror}", hint="the head's IP address does as well") from None


def _typed_address(advertise: str, interface: str | None, own: dict[str, str]) -> Chosen:
    if advertise not in own:
        raise UsageError(f"--advertise {advertise} is no address of this host", hint=_which(own))
    if interface is not None and own[advertise] != interface:
        raise UsageError(
            f"--advertise {advertise} is on {own[advertise]}, not on --interface {interface}", hint=_which(own)
        )
    return Chosen(advertise, own[advertise], "as --advertise says")


def _typed_interface(interface: str, own: dict[str, str]) -> Chosen:
    addresses = [address for address, name in own.items() if name == interface]
    if not addresses:
        exists = interface in (name for _, name in socket.if_nameindex())
        found = "has no address" if exists else "does not exist on this host"
        raise UsageError(f"--interface {interface} {found}", hint=_which(own))
    return Chosen(addresses[0], interface, "as --interface says")


def _by_route(peer: str | None, own: dict[str, str]) -> Chosen:
    try:
        way = way_to(peer or _ANYWHERE)
    except OSError as error:
        if peer is not None:
            raise UsageError(f"no route to the head {peer}: {error.strerror}", hint=_which(own)) from None
        return _the_only_one(own)
    leaves = f"the route to the head {peer} leaves there" if peer else "the default route leaves there"
    return Chosen(way.address, way.interface or own.get(way.address, ""), leaves)


def _the_only_one(own: dict[str, str]) -> Chosen:
    fit = {address: name for address, name in own.items() if not kind_of(name)}
    if len(set(fit.values())) != 1:
        what = "several networks and no default route" if fit else "no network that other hosts could be on"
        raise UsageError(f"which address may other hosts use? this host has {what}", hint=_which(own))
    address, name = next(iter(fit.items()))
    return Chosen(address, name, "the only network of this host")


def _which(own: dict[str, str]) -> str:
    fit = [f"{name} {address}" for address, name in own.items() if not kind_of(name)]
    return f"--interface or --advertise with one of: {', '.join(fit) or 'none is fit; connect this host to a network'}"


def _describe(address: str, name: str) -> str:
    return f"{name} {address} ({kind_of(name)})" if kind_of(name) else f"{name} {address}"


def _is_inside_container(interface: str) -> bool:
    """A container with a network of its own: its card is one end of a cable whose other end is elsewhere."""
    folder = Path("/sys/class/net") / interface
    try:
        is_cable = (folder / "iflink").read_text() != (folder / "ifindex").read_text()
    except OSError:
        return False
    return is_cable and any(mark.exists() for mark in _CONTAINER_MARKS)
