"""Whether every host can open connections to every other, on ports such as collectives use."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.network import read_networks
from aphro_core.doctor.reach import call, listening
from aphro_core.remote.remote import Host, read

ID: Final = "net.reach"
TITLE: Final = "connections between hosts"
EXPLAIN: Final = """
Listens on each host in turn, at the address that its peers reach, on three ports of ip_local_port_range, and connects
from every other host. Gloo and NCCL listen on such ports, on any of them, in both directions. PASS when all connect
within a second; WARN when one is slower; FAIL with both ends named for refused, no route, or no answer, which is a
firewall that drops packets. SKIP on one host.
"""
_SLOW_SECONDS: Final = 1.0


async def check(cluster: Cluster) -> list[Finding]:
    if len(cluster.hosts) == 1:
        return [Finding(ID, Status.SKIP, "one host: nobody to connect to")]
    networks = await read_networks(cluster.hosts)
    findings: list[Finding] = []
    lines: list[Evidence] = []
    for host, network in zip(cluster.hosts, networks, strict=True):
        cluster.progress(f"{ID}: connecting to {host.name}")
        if network.outward is None:
            findings.append(Finding(ID, Status.FAIL, f"{host.name} has no way to its peers", host=host.name))
            continue
        findings += await _check_target(cluster, host, network.outward.address, lines)
    if findings:
        return findings
    pairs = len(cluster.hosts) * (len(cluster.hosts) - 1)
    return [
        Finding(
            ID, Status.PASS, f"all {pairs} directions between {len(cluster.hosts)} hosts connect", False, tuple(lines)
        )
    ]


async def _check_target(cluster: Cluster, target: Host, address: str, lines: list[Evidence]) -> list[Finding]:
    found = []
    async with listening(target, address) as listener:
        for source in cluster.hosts:
            if source is target:
                continue
            called = await call(source, listener)
            failed = {port: words for port, words in called.tcp.items() if isinstance(words, str)}
            slow = {port: took for port, took in called.tcp.items() if isinstance(took, float) and took > _SLOW_SECONDS}
            where = f"{source.name} -> {target.name} ({address})"
            evidence = tuple(
                Evidence("connect", 0, f"{where} port {port}: {_words(what)}") for port, what in called.tcp.items()
            )
            lines += evidence[:1]
            if failed:
                ports = ", ".join(failed)
                title = f"{source.name} cannot connect to {target.name}: {next(iter(failed.values()))} (ports {ports})"
                remedy = await _remedy(source, target)
                found.append(Finding(ID, Status.FAIL, title, True, evidence, remedy, target.name))
            elif slow:
                title = f"{source.name} -> {target.name}: {max(slow.values()):.1f} s for a connection"
                found.append(
                    Finding(ID, Status.WARN, title, False, evidence, "look at name servers and firewalls", target.name)
                )
    return found


async def _remedy(source: Host, target: Host) -> str:
    text = await read(target, "/proc/sys/net/ipv4/ip_local_port_range") or "32768 60999"
    low, high = text.split()[:2]
    return (
        f"on {target.name}: sudo ufw allow from {source.address} to any port {low}:{high} proto tcp, or "
        f"sudo firewall-cmd --zone=trusted --add-source={source.address}; a narrower range: "
        'sudo sysctl net.ipv4.ip_local_port_range="50000 51000"'
    )


def _words(what: float | str) -> str:
    return what if isinstance(what, str) else f"{1000 * what:.1f} ms"
