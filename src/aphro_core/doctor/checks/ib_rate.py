"""Whether RDMA links run at their full width and speed."""

from __future__ import annotations

import re
from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.rdma import NO_RDMA, read_selected
from aphro_core.remote.remote import Host

ID: Final = "ib.rate"
TITLE: Final = "RDMA link rates"
EXPLAIN: Final = """
Reads the rate of each ACTIVE port that NCCL would use. PASS when all are equal, of four lanes; WARN when one is lower
than the others (rings run at the slowest rail); FAIL for one or two lanes, or SDR and DDR speeds: a bad cable or port.
"""
_NARROW: Final = re.compile(r"\((1X|2X)\b|\b(SDR|DDR)\)")


async def check(host: Host) -> Finding:
    ports, _ = await read_selected(host)
    if not ports:
        return Finding(ID, Status.SKIP, NO_RDMA)
    evidence = tuple(port.evidence("rate") for port in ports)
    best = max(port.gbits for port in ports)
    narrow = [port for port in ports if _NARROW.search(port.rate)]
    slow = [port for port in ports if port.gbits < best]
    for bad, status in ((narrow, Status.FAIL), (slow, Status.WARN)):
        if bad:
            title = ", ".join(f"{port.label} only runs at {port.rate}" for port in bad)
            title += f", others at {best:g} Gb/sec" if bad is slow else ""
            remedy = f"re-seat or replace the cable: mlxlink -d {bad[0].device} -m -c -e"
            return Finding(ID, status, title, False, evidence, remedy)
    return Finding(ID, Status.PASS, f"{len(ports)} ports at {ports[0].rate}", evidence=evidence)
