"""Which variables steer NCCL on each host, which of them are left-overs, and where hosts differ."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.environment import Variable, read_variables
from aphro_core.doctor.finding import Evidence, Finding, Status

ID: Final = "nccl.env"
TITLE: Final = "NCCL's variables"
EXPLAIN: Final = """
Collects NCCL_* and GLOO_* from the environment of a process started on each host, from /etc/nccl.conf, ~/.nccl.conf and
NCCL_CONF_FILE. PASS when none is set or all are equal on all hosts; WARN for variables that are meant for debugging and
cost speed when left set, and for differences between hosts (interface names may differ rightly); FAIL when RDMA was
asked for and is switched off. A variable set in a shell reaches only that host's processes.
"""
_DEBUGGING: Final = (
    "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_NET_GDR_LEVEL", "NCCL_ALGO", "NCCL_PROTO",
    "NCCL_BUFFSIZE", "NCCL_NVLS_ENABLE", "NCCL_CUMEM_ENABLE", "NCCL_IB_DISABLE", "NCCL_NET",
)  # fmt: skip
_OWN: Final = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_HOSTID")  # rightly of one host


async def check(cluster: Cluster) -> Finding:
    tables = {host.name: await read_variables(host, "NCCL_*", "GLOO_*") for host in cluster.hosts}
    everything = [(host, variable) for host, table in tables.items() for variable in table.values()]
    evidence = tuple(_line(host, variable) for host, variable in everything)
    off = [
        item
        for item in everything
        if (item[1].name, item[1].value) in (("NCCL_IB_DISABLE", "1"), ("NCCL_NET", "Socket"))
    ]
    if cluster.ib and off:
        variable = off[0][1]
        title = f"{variable.name}={variable.value} switches RDMA off ({variable.file})"
        return Finding(ID, Status.FAIL, title, True, evidence, f"unset {variable.name}", off[0][0])
    left = sorted({variable.name for _, variable in everything if variable.name in _DEBUGGING})
    if left:
        title = f"left over from debugging: {', '.join(left)}"
        return Finding(ID, Status.WARN, title, False, evidence, f"unset {' '.join(left)}, unless measured to help")
    different = sorted(
        {variable.name for _, variable in everything if variable.name not in _OWN and _differs(variable.name, tables)}
    )
    if different:
        title = f"not the same on all hosts: {', '.join(different)}"
        return Finding(ID, Status.WARN, title, False, evidence, "export the same on every host, or in /etc/nccl.conf")
    count = len({variable.name for _, variable in everything})
    title = f"{count} variables, equal on all hosts" if count else "no NCCL_* or GLOO_* variable is set"
    return Finding(ID, Status.PASS, title, evidence=evidence)


def _differs(name: str, tables: dict[str, dict[str, Variable]]) -> bool:
    return len({table[name].value if name in table else None for table in tables.values()}) > 1


def _line(host: str, variable: Variable) -> Evidence:
    return Evidence(variable.file, variable.line, f"{host + ': ' if host else ''}{variable.name}={variable.value}")
