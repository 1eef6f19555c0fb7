"""Which address of an Ethernet RDMA port NCCL has to use, and whether there is one."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.environment import read_variables
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.rdma import Port, read_selected
from aphro_core.remote.remote import Host

ID: Final = "roce.gid"
TITLE: Final = "RoCE addresses (GIDs)"
EXPLAIN: Final = """
Reads the GID table of each ACTIVE Ethernet port that NCCL would use: type, address and network device of every index in
use. PASS when there is a RoCE v2 entry with an IPv4 address, whose index is printed; WARN when only IPv6 entries of
version 2 are there, or when NCCL_IB_GID_INDEX is set although NCCL chooses by itself since 2.21; FAIL without an entry
of version 2, or when NCCL_IB_GID_INDEX names one that is empty or of version 1.
"""
_REMEDY: Final = (
    "give the port an address: sudo ip addr add A.B.C.D/LEN dev IF; in a container: --network host, or the RDMA "
    "interface inside the pod, else the table is empty"
)


async def check(host: Host) -> Finding:
    ports = [port for port in (await read_selected(host))[0] if port.is_ethernet]
    if not ports:
        return Finding(ID, Status.SKIP, "no RoCE port is ACTIVE here")
    evidence = [_line(port, gid.index) for port in ports for gid in port.gids]
    without = [port.label for port in ports if port.roce_gid is None]
    if without:
        title = f"no RoCE v2 address on {', '.join(without)}"
        return Finding(ID, Status.FAIL, title, True, tuple(evidence), _REMEDY)
    variable = (await read_variables(host, "NCCL_IB_GID_INDEX")).get("NCCL_IB_GID_INDEX")
    if variable is not None:
        evidence.insert(0, Evidence(variable.file, variable.line, f"NCCL_IB_GID_INDEX={variable.value}"))
        return _judge_index(variable.value, ports, tuple(evidence))
    choice = ", ".join(f"{port.label} index {port.roce_gid.index}" for port in ports if port.roce_gid)
    ipv6 = [port.label for port in ports if port.roce_gid and not port.roce_gid.ipv4]
    if ipv6:
        title = f"only IPv6 entries of RoCE v2 on {', '.join(ipv6)}"
        return Finding(ID, Status.WARN, title, False, tuple(evidence), _REMEDY)
    return Finding(ID, Status.PASS, f"RoCE v2 over IPv4: {choice}", evidence=tuple(evidence))


def _judge_index(value: str, ports: list[Port], evidence: tuple[Evidence, ...]) -> Finding:
    """What a forced index means on each port: one number for all, whose tables may differ."""
    wrong = []
    for port in ports:
        gid = next((gid for gid in port.gids if str(gid.index) == value), None)
        if gid is None or gid.version != 2:
            wrong.append(f"{port.label}: {'empty' if gid is None else f'RoCE v{gid.version}'}")
    remedy = "unset NCCL_IB_GID_INDEX (NCCL 2.21 and newer choose); before: " + ", ".join(
        f"{port.label} index {port.roce_gid.index}" for port in ports if port.roce_gid
    )
    if wrong:
        title = f"NCCL_IB_GID_INDEX={value} is no RoCE v2 address ({'; '.join(wrong)})"
        return Finding(ID, Status.FAIL, title, True, evidence, remedy)
    title = f"NCCL_IB_GID_INDEX={value} is set, right here and now; NCCL chooses by itself since 2.21"
    return Finding(ID, Status.WARN, title, False, evidence, remedy)


def _line(port: Port, index: int) -> Evidence:
    gid = next(gid for gid in port.gids if gid.index == index)
    kind = f"RoCE v{gid.version}" if gid.version else "InfiniBand"
    text = f"{port.label} index {index}: {kind}, {gid.ipv4 or gid.address}, {gid.interface or 'no interface'}"
    return Evidence(f"/sys/class/infiniband/{port.device}/ports/{port.number}/gids/{index}", 1, text)
