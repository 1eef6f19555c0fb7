"""Whether the kernel moves pages between NUMA nodes under a worker, and which node each GPU is at."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.pci import read_accelerators
from aphro_core.remote.remote import Host, read

ID: Final = "host.numa"
TITLE: Final = "NUMA nodes"
EXPLAIN: Final = """
Reads /sys/devices/system/node, the numa_node of each GPU and RDMA device, and /proc/sys/kernel/numa_balancing. PASS on
one node or with the placement in words; WARN when automatic balancing is on where AMD GPUs are (their driver asks for
it to be off), or when GPUs of a host with several nodes say that they belong to none: a virtual machine that hides it.
"""


async def check(host: Host) -> Finding:
    nodes = await host.links("/sys/devices/system/node/node[0-9]*")
    devices = await read_accelerators(host)
    balancing = await read(host, "/proc/sys/kernel/numa_balancing")
    evidence = [Evidence(f"/sys/bus/pci/devices/{device.bdf}/numa_node", 1, f"{device.label}: node {device.numa_node}")
                for device in devices]  # fmt: skip
    if balancing == "1" and await host.links("/dev/kfd"):
        evidence.append(Evidence("/proc/sys/kernel/numa_balancing", 1, balancing))
        title = "automatic NUMA balancing is on beside AMD GPUs"
        return Finding(ID, Status.WARN, title, False, tuple(evidence), "sudo sysctl kernel.numa_balancing=0")
    if len(nodes) > 1 and devices and all(device.numa_node < 0 for device in devices):
        title = f"{len(nodes)} NUMA nodes, but no GPU says where it is: NCCL and workers have to guess"
        return Finding(ID, Status.WARN, title, False, tuple(evidence), "virtual machine: the provider's NCCL_TOPO_FILE")
    count = f"{len(nodes) or 1} NUMA node{'s' if len(nodes) > 1 else ''}"
    return Finding(ID, Status.PASS, f"{count}, {len(devices)} GPUs and RDMA devices", evidence=tuple(evidence))
