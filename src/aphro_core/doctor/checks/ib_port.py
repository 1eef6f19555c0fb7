"""Whether RDMA ports are up."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.rdma import NO_RDMA, Port, read_devices
from aphro_core.remote.remote import Host

ID: Final = "ib.port"
TITLE: Final = "RDMA port states"
EXPLAIN: Final = """
Reads state and phys_state of every port. PASS when all are ACTIVE, or when those that are down have never had a cable
(NCCL leaves them out, and boards have ports for management and storage); WARN for a port that is between states while
others are ACTIVE; FAIL when none is ACTIVE. INIT with LinkUp on InfiniBand means that no subnet manager has spoken to
the port; Polling or Disabled is a cable or a switch port.
"""


async def check(host: Host) -> Finding:
    ports = [port for device in await read_devices(host) for port in device.ports]
    if not ports:
        return Finding(ID, Status.SKIP, NO_RDMA)
    evidence = tuple(line for port in ports for line in (port.evidence("state"), port.evidence("phys_state")))
    active = [port for port in ports if port.is_active]
    down = [port for port in ports if not port.is_active]
    if not active:
        title = f"no RDMA port is ACTIVE: {', '.join(_words(port) for port in down)}"
        return Finding(ID, Status.FAIL, title, True, evidence, _remedy(down[0]))
    waiting = [port for port in down if _is_linked(port)]
    if waiting:
        title = f"{', '.join(_words(port) for port in waiting)}, while {len(active)} ports are ACTIVE"
        return Finding(ID, Status.WARN, title, False, evidence, _remedy(waiting[0]))
    unused = f"; not in use: {', '.join(_words(port) for port in down)}" if down else ""
    return Finding(ID, Status.PASS, f"{len(active)} ports ACTIVE{unused}", evidence=evidence)


def _words(port: Port) -> str:
    return f"{port.label} {port.state.partition(': ')[2]}/{port.phys_state.partition(': ')[2]}"


def _is_linked(port: Port) -> bool:
    return "LinkUp" in port.phys_state or "Recovery" in port.phys_state


def _remedy(port: Port) -> str:
    if port.is_ethernet:
        return f"sudo ip link set <the interface of {port.device}> up; then cable and switch port"
    if _is_linked(port):
        return "start a subnet manager on one node (sudo systemctl start opensm) or on the switch; `sminfo` asks for it"
    return f"cable and switch port of {port.label}: `ibstat {port.device}`, `mlxlink -d {port.device} -m -c -e`"
