"""Whether each RoCE rail leaves by its own port."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.rdma import Gid, read_selected
from aphro_core.remote.remote import NOT_FOUND, Host

ID: Final = "roce.route"
TITLE: Final = "routes of RoCE rails"
EXPLAIN: Final = """
Asks each host's kernel (`ip route get`) by which interface a packet from a rail's address to the same rail of the other
hosts would leave. PASS when each leaves by its own port; FAIL when one leaves by another port: all rails then share it,
and replies come from the wrong card; SKIP on one host, without RoCE, or without `ip`.
"""
_REMEDY: Final = (
    "a routing table for each port: sudo ip rule add from ADDRESS table N; sudo ip route add SUBNET dev IF table N; "
    "NCCL_CROSS_NIC=0 where rails cannot reach each other"
)


async def check(cluster: Cluster) -> list[Finding]:
    rails = {host.name: await _rails(host) for host in cluster.hosts}
    if len(cluster.hosts) == 1 or not all(rails.values()):
        title = "one host: no rails to others" if len(cluster.hosts) == 1 else "not every host has RoCE over IPv4"
        return [Finding(ID, Status.SKIP, title)]
    findings = []
    for host in cluster.hosts:
        lines, wrong = [], []
        for number, gid in enumerate(rails[host.name]):
            for peer, others in rails.items():
                if peer == host.name or number >= len(others):
                    continue
                output = await host.run("ip", "-o", "route", "get", others[number].ipv4, "from", gid.ipv4)
                if output.returncode == NOT_FOUND:
                    return [Finding(ID, Status.SKIP, f"`ip` is not installed on {host.name}")]
                text = output.stdout.strip() or output.stderr.strip()
                lines.append(Evidence(f"ip route get {others[number].ipv4} from {gid.ipv4}", 0, text))
                wrong += [] if f"dev {gid.interface} " in f"{text} " else [f"rail {number} ({gid.ipv4}) to {peer}"]
        status = Status.FAIL if wrong else Status.PASS
        title = f"leaves by another port: {', '.join(wrong)}" if wrong else "every rail leaves by its own port"
        findings.append(Finding(ID, status, title, bool(wrong), tuple(lines), _REMEDY if wrong else "", host.name))
    return findings


async def _rails(host: Host) -> list[Gid]:
    """The addresses of the RoCE ports that NCCL would use, in their order."""
    ports = (await read_selected(host))[0]
    return [port.roce_gid for port in ports if port.is_ethernet and port.roce_gid and port.roce_gid.ipv4]
