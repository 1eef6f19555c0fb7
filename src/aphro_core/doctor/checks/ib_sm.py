"""Whether a subnet manager has given InfiniBand ports their addresses."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.rdma import NO_RDMA, read_devices
from aphro_core.remote.remote import Host

ID: Final = "ib.sm"
TITLE: Final = "InfiniBand subnet manager"
EXPLAIN: Final = """
Reads lid and sm_lid of every InfiniBand port whose link is up. PASS when both are set; FAIL when one is zero: no subnet
manager serves that fabric, and no queue pair will connect. SKIP without InfiniBand ports (RoCE needs none).
"""


async def check(host: Host) -> Finding:
    ports = [port for device in await read_devices(host) for port in device.ports if port.link_layer == "InfiniBand"]
    linked = [port for port in ports if port.is_active or "LinkUp" in port.phys_state]
    if not linked:
        return Finding(ID, Status.SKIP, "no InfiniBand port whose link is up" if ports else NO_RDMA)
    evidence = tuple(line for port in linked for line in (port.evidence("lid"), port.evidence("sm_lid")))
    without = [port.label for port in linked if not (port.lid and port.sm_lid)]
    if without:
        remedy = "start a subnet manager: sudo systemctl start opensm on one node, or that of the switch; `sminfo` asks"
        return Finding(ID, Status.FAIL, f"no subnet manager for {', '.join(without)}", True, evidence, remedy)
    return Finding(ID, Status.PASS, f"{len(linked)} ports have their LIDs", evidence=evidence)
