"""Whether the host's own name leads peers to it, or to themselves."""

from __future__ import annotations

import ipaddress
from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.remote.remote import Host, read

ID: Final = "name.loopback"
TITLE: Final = "host name resolution"
EXPLAIN: Final = """
Resolves the host's own name as it does itself (getent ahosts), and looks for the line in /etc/hosts. Gloo and many
launchers announce the address that this name has: at 127.0.1.1, as Debian's installer writes it, peers connect to
themselves and wait for ever. PASS for an address of the network, FAIL for loopback alone or for no address, SKIP for
the same on one host that is looked at alone.
"""


async def check(cluster: Cluster) -> list[Finding]:
    return [await _check_host(host, is_alone=len(cluster.hosts) == 1) for host in cluster.hosts]


async def _check_host(host: Host, *, is_alone: bool) -> Finding:
    name = (await host.run("uname", "-n")).stdout.strip()
    resolved = await host.run("getent", "ahosts", name)
    addresses = list(dict.fromkeys(line.split()[0] for line in resolved.stdout.splitlines() if line.strip()))
    outward = [address for address in addresses if not ipaddress.ip_address(address.split("%")[0]).is_loopback]
    read_of = Evidence(f"getent ahosts {name}", 0, " ".join(addresses) or "no address")
    if outward:
        return Finding(ID, Status.PASS, f"{name} is {outward[0]}", evidence=(read_of,), host=host.name)
    what = f"{name} resolves to {addresses[0]} only" if addresses else f"{name} does not resolve"
    if is_alone:
        title = f"{what}; on one host that does no harm, as a node of a cluster it would"
        return Finding(ID, Status.SKIP, title, evidence=(read_of,), host=host.name)
    line = _find_line(await read(host, "/etc/hosts") or "", name)
    change = f"{line.file} line {line.line}: replace `{line.text}` by" if line else "add to /etc/hosts"
    remedy = f"{change} `<address in the network> {name}`; or export GLOO_SOCKET_IFNAME=<interface>"
    evidence = (line, read_of) if line else (read_of,)
    title = f"the host's own name {what}: peers would connect to themselves"
    return Finding(ID, Status.FAIL, title, evidence=evidence, remedy=remedy, host=host.name)


def _find_line(hosts: str, name: str) -> Evidence | None:
    for number, line in enumerate(hosts.splitlines(), 1):
        words = line.partition("#")[0].split()
        if name in words[1:]:
            return Evidence("/etc/hosts", number, line.strip())
    return None
