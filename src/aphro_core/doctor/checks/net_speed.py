"""How fast the interfaces between hosts say they are."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.network import read_networks
from aphro_core.remote.remote import read

ID: Final = "net.speed"
TITLE: Final = "link speed"
EXPLAIN: Final = """
Reads /sys/class/net/IF/speed of the interface towards the peers on each host. PASS from 25 Gb/s on; WARN for less:
tensor parallel across such a link spends more time there than it saves, pipeline parallel does not. SKIP on one host
and for interfaces that do not say (virtual ones often do not); comm.gloo and comm.nccl measure.
"""
_WANTED_MBITS: Final = 25_000


async def check(cluster: Cluster) -> list[Finding]:
    if len(cluster.hosts) == 1:
        return [Finding(ID, Status.SKIP, "one host: no link between hosts")]
    findings = []
    for host, network in zip(cluster.hosts, await read_networks(cluster.hosts), strict=True):
        name = network.outward.interface if network.outward else ""
        path = f"/sys/class/net/{name}/speed"
        text = await read(host, path) if name else None
        if not text or not text.isdigit():
            findings.append(
                Finding(ID, Status.SKIP, f"{name or 'the interface'} does not say its speed", host=host.name)
            )
            continue
        is_fast = int(text) >= _WANTED_MBITS
        evidence = (Evidence(path, 1, text),)
        remedy = "" if is_fast else "-tp inside each host, -pp across hosts"
        title = f"{name}: {int(text) / 1000:g} Gb/s"
        findings.append(Finding(ID, Status.PASS if is_fast else Status.WARN, title, False, evidence, remedy, host.name))
    return findings
