"""Whether RoCE packets can be as large as the card allows."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.rdma import read_selected
from aphro_core.remote.remote import Host, read

ID: Final = "roce.mtu"
TITLE: Final = "RoCE packet size"
EXPLAIN: Final = """
Reads the MTU of the network device behind each RoCE port; the RDMA MTU is the largest of 256, 512, 1024, 2048 and 4096
that fits into it beside 64 bytes of headers. PASS for 4096 (a device MTU of 4200 or more); WARN below, and for ports
that differ. Compare hosts too: net.mtu.
"""
_SIZES: Final = (4096, 2048, 1024, 512, 256)
_HEADERS: Final = 64


async def check(host: Host) -> Finding:
    ports = [port for port in (await read_selected(host))[0] if port.is_ethernet]
    if not ports:
        return Finding(ID, Status.SKIP, "no RoCE port is ACTIVE here")
    active: dict[str, int] = {}
    evidence = []
    for port in ports:
        name = next((gid.interface for gid in port.gids if gid.interface), "")
        text = await read(host, f"/sys/class/net/{name}/mtu") if name else None
        if text and text.isdigit():
            active[port.label] = next((size for size in _SIZES if size <= int(text) - _HEADERS), 0)
            evidence.append(
                Evidence(f"/sys/class/net/{name}/mtu", 1, f"{port.label} {name}: {text} -> {active[port.label]}")
            )
    if not active:
        return Finding(ID, Status.SKIP, "no network device of a RoCE port is visible here", evidence=tuple(evidence))
    small = [label for label, size in active.items() if size < _SIZES[0]]
    if small:
        title = f"RDMA packets of {min(active.values())} bytes on {', '.join(small)}; the card can do 4096"
        remedy = "sudo ip link set IF mtu 9000 on every host, and the switch to the same"
        return Finding(ID, Status.WARN, title, False, tuple(evidence), remedy)
    return Finding(ID, Status.PASS, f"RDMA packets of 4096 bytes on {len(active)} ports", evidence=tuple(evidence))
