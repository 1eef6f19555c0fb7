"""Whether packets of full size pass between hosts."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.network import Network, read_networks
from aphro_core.doctor.reach import call, listening
from aphro_core.remote.remote import Host, read

ID: Final = "net.mtu"
TITLE: Final = "packet sizes"
EXPLAIN: Final = """
Reads the MTU of the interface towards the peers on each host, and sends a datagram of that size that may not be cut
from the first host to each other one. PASS when sizes are equal and it arrives; WARN for 1500 on a link of 100 Gb/s or
more; FAIL for different sizes, or when the large packet is lost although small ones pass: connections then open and
hang with their first tensor. SKIP on one host.
"""
_ETHERNET: Final = 1500
_FAST_MBITS: Final = 100_000
_WAIT_SECONDS: Final = 2.0


async def check(cluster: Cluster) -> Finding:
    if len(cluster.hosts) == 1:
        return Finding(ID, Status.SKIP, "one host: no packets between hosts")
    networks = await read_networks(cluster.hosts)
    sizes, evidence, is_fast = {}, [], False
    for host, network in zip(cluster.hosts, networks, strict=True):
        name = network.outward.interface if network.outward else ""
        mtu = await read(host, f"/sys/class/net/{name}/mtu") if name else None
        speed = await read(host, f"/sys/class/net/{name}/speed") if name else None
        is_fast = is_fast or bool(speed and speed.lstrip("-").isdigit() and int(speed) >= _FAST_MBITS)
        if mtu and mtu.isdigit():
            sizes[host.name] = int(mtu)
            evidence.append(Evidence(f"/sys/class/net/{name}/mtu", 1, f"{host.name} {name}: {mtu}"))
    remedy = "sudo ip link set IF mtu 9000 on every host, and the switch to the same"
    if len(sizes) < len(cluster.hosts):
        return Finding(ID, Status.SKIP, "not every interface says its MTU", False, tuple(evidence))
    if len(set(sizes.values())) > 1:
        text = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return Finding(ID, Status.FAIL, f"different MTUs: {text}", True, tuple(evidence), remedy)
    lost = await _lost(cluster, networks, min(sizes.values()))
    if lost:
        title = f"packets of {min(sizes.values())} bytes do not arrive: {', '.join(lost)}"
        return Finding(ID, Status.FAIL, title, True, tuple(evidence), f"{remedy}; or mtu 1500 everywhere")
    if is_fast and min(sizes.values()) <= _ETHERNET:
        return Finding(ID, Status.WARN, "1500 bytes on a fast link", False, tuple(evidence), remedy)
    return Finding(ID, Status.PASS, f"packets of {min(sizes.values())} bytes pass", False, tuple(evidence))


async def _lost(cluster: Cluster, networks: list[Network], size: int) -> list[str]:
    source: Host = cluster.hosts[0]
    lost = []
    for target, network in list(zip(cluster.hosts, networks, strict=True))[1:]:
        if network.outward is None or ":" in network.outward.address:
            continue  # of IPv6 the sender always finds out the size
        async with listening(target, network.outward.address) as listener:
            called = await call(source, listener, packet_bytes=size)
            arrived = 0 if called.udp_error else await listener.received_bytes(_WAIT_SECONDS)
            if not arrived and not any(isinstance(took, float) for took in called.tcp.values()):
                continue  # nothing arrives at all: net.reach says so
            if not arrived:
                lost.append(f"{source.name} -> {target.name}" + (f" ({called.udp_error})" if called.udp_error else ""))
    return lost
