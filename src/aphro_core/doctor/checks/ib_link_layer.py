"""Whether the ports that NCCL takes are of one kind of network."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.rdma import NO_RDMA, read_selected
from aphro_core.remote.remote import Host

ID: Final = "ib.link-layer"
TITLE: Final = "InfiniBand or RoCE"
EXPLAIN: Final = """
Reads the link layer of each ACTIVE port that NCCL would use. PASS when all are InfiniBand or all are Ethernet (RoCE);
WARN when both are among them: NCCL before 2.26 may pair one kind with the other and hang, newer ones refuse.
"""


async def check(host: Host) -> Finding:
    ports, _ = await read_selected(host)
    if not ports:
        return Finding(ID, Status.SKIP, NO_RDMA)
    evidence = tuple(port.evidence("link_layer") for port in ports)
    kinds = sorted({port.link_layer for port in ports})
    if len(kinds) == 1:
        name = "RoCE" if ports[0].is_ethernet else kinds[0]
        return Finding(ID, Status.PASS, f"{name} on all {len(ports)} ports", evidence=evidence)
    infiniband = [port.label for port in ports if not port.is_ethernet]
    title = f"{' and '.join(kinds)} ports are mixed"
    return Finding(ID, Status.WARN, title, False, evidence, f"export NCCL_IB_HCA=={','.join(infiniband)}")
