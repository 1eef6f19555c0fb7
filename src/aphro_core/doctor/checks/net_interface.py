"""Which interface collectives use on each host, and whether it is the one that leads to the peers."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.environment import Variable, read_variables
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.network import Interface, Network, read_networks
from aphro_core.doctor.socket_filter import default_choice, selects
from aphro_core.remote.remote import Host

ID: Final = "net.interface"
TITLE: Final = "network interfaces"
EXPLAIN: Final = """
Lists the interfaces with an address, applies NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME as NCCL and Gloo do, and asks
the kernel by which interface the route to the other hosts leaves. PASS when that one is used; WARN when NCCL would take
another one first (a VPN, a bridge, a second subnet); FAIL when a variable matches nothing or excludes the right one, or
when there is no route. Alone, a host only answers whether the variables match something.
"""


async def check(cluster: Cluster) -> list[Finding]:
    networks = await read_networks(cluster.hosts)
    is_alone = len(cluster.hosts) == 1
    return [await _check_host(host, network, is_alone) for host, network in zip(cluster.hosts, networks, strict=True)]


async def _check_host(host: Host, network: Network, is_alone: bool) -> Finding:
    variables = await read_variables(host, "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    usable = [entry for entry in network.interfaces if entry.is_up and entry.addresses]
    evidence = [Evidence("interfaces", 0, _describe(entry)) for entry in usable]
    evidence += [Evidence(found.file, found.line, f"{found.name}={found.value}") for found in variables.values()]
    names = [entry.name for entry in usable]
    route = network.outward
    right = route.interface if route else ""
    remedy = f"export NCCL_SOCKET_IFNAME=={right} GLOO_SOCKET_IFNAME={right}" if right else (
        "unset NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME"
    )  # fmt: skip

    def finding(status: Status, title: str) -> Finding:
        line = "" if status in (Status.PASS, Status.SKIP) else remedy
        return Finding(ID, status, title, status is Status.FAIL, tuple(evidence), line, host.name)

    for variable in variables.values():
        if not any(_takes(variable, name) for name in names):
            return finding(Status.FAIL, f"{variable.name}={variable.value} matches no interface that is up")
    if is_alone:
        return finding(Status.PASS, f"interfaces: {', '.join(names)}; on one host any will do")
    if route is None:
        errors = ", ".join(
            f"{entry.peer}: {entry.error or f'it resolves to {entry.address}'}" for entry in network.routes
        )
        return finding(Status.FAIL, f"no route to the other hosts ({errors})")
    for variable in variables.values():
        if not _takes(variable, right):
            return finding(Status.FAIL, f"{variable.name}={variable.value} leaves out {right}, the way to the peers")
    chosen = default_choice(names)
    if "NCCL_SOCKET_IFNAME" not in variables and right not in chosen[:1]:
        return finding(Status.WARN, f"the way to the peers is {right}, but NCCL by itself takes {', '.join(chosen)}")
    return finding(Status.PASS, f"{right} ({route.address}) leads to the peers")


def _takes(variable: Variable, name: str) -> bool:
    if variable.name == "GLOO_SOCKET_IFNAME":
        return name in variable.value.split(",")
    return selects(variable.value, name)


def _describe(entry: Interface) -> str:
    return f"{entry.name} {' '.join(entry.addresses)}{' (loopback)' if entry.is_loopback else ''}"
