"""Whether hosts have the same RDMA ports."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.rdma import NO_RDMA, Port, read_selected

ID: Final = "ib.symmetry"
TITLE: Final = "RDMA ports on all hosts"
EXPLAIN: Final = """
Compares number, names, rates and link layers of the ACTIVE ports that NCCL would use on each host. PASS when equal;
WARN when only names or rates differ; FAIL when the numbers or the link layers do: ranks then disagree on channels, and
NCCL hangs or refuses. SKIP on one host or without RDMA.
"""


async def check(cluster: Cluster) -> Finding:
    tables = {host.name: (await read_selected(host))[0] for host in cluster.hosts}
    if len(tables) == 1 or not any(tables.values()):
        return Finding(ID, Status.SKIP, NO_RDMA if len(tables) > 1 else "one host: nothing to compare")
    evidence = tuple(Evidence("/sys/class/infiniband", 0, f"{name}: {_words(ports)}") for name, ports in tables.items())
    common = [port.label for port in next(iter(tables.values()))
              if all(port.label in [other.label for other in ports] for ports in tables.values())]  # fmt: skip
    remedy = f"on all hosts: export NCCL_IB_HCA=={','.join(common)}" if common else "name equal ports in NCCL_IB_HCA"
    if len({len(ports) for ports in tables.values()}) > 1:
        text = ", ".join(f"{name} {len(ports)}" for name, ports in tables.items())
        return Finding(ID, Status.FAIL, f"different numbers of ports: {text}", True, evidence, remedy)
    if len({tuple(sorted(port.link_layer for port in ports)) for ports in tables.values()}) > 1:
        return Finding(ID, Status.FAIL, "InfiniBand on one host, RoCE on another", True, evidence, remedy)
    for values, title in (
        ({tuple(port.label for port in ports) for ports in tables.values()}, "equal numbers of ports, other names"),
        ({tuple(port.rate for port in ports) for ports in tables.values()}, "the same ports at different rates"),
    ):
        if len(values) > 1:
            return Finding(ID, Status.WARN, title, False, evidence, remedy)
    count = len(next(iter(tables.values())))
    return Finding(ID, Status.PASS, f"the same {count} ports on {len(tables)} hosts", evidence=evidence)


def _words(ports: list[Port]) -> str:
    return ", ".join(f"{port.label} {port.link_layer} {port.rate}" for port in ports) or "none"
