"""Whether the PCIe tree can be seen, from which NCCL reads its topology."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import has_gpu_files
from aphro_core.doctor.pci import is_virtual
from aphro_core.remote.remote import Host

ID: Final = "host.sys"
TITLE: Final = "visible topology"
EXPLAIN: Final = """
Looks at /sys/bus/pci, at the processor's hypervisor flag and at the marks of a container. PASS when the PCIe tree is
visible on a real machine, or without GPUs; WARN with GPUs when it is hidden or virtual: NCCL then guesses which GPU is
near which network card.
"""


async def check(host: Host) -> Finding:
    devices = await host.links("/sys/bus/pci/devices/*")
    marks = await host.files("/.dockerenv", "/run/.containerenv")
    where = "a container" if marks else "no container"
    virtual = await is_virtual(host)
    where += ", a virtual machine" if virtual else ""
    evidence = (Evidence("/sys/bus/pci/devices", 0, f"{len(devices)} devices; {where}"),)
    if not await has_gpu_files(host):
        return Finding(ID, Status.PASS, f"{where}; no GPU whose place matters", evidence=evidence)
    if not devices:
        remedy = "mount /sys into the container"
        return Finding(ID, Status.WARN, "the PCIe tree is hidden: NCCL guesses", evidence=evidence, remedy=remedy)
    if virtual:
        remedy = "use the provider's NCCL_TOPO_FILE if it has one; gpu.topology and comm.nccl say whether it matters"
        return Finding(ID, Status.PASS, f"{where}: NCCL sees a virtual PCIe tree", evidence=evidence, remedy=remedy)
    return Finding(ID, Status.PASS, f"{where}; {len(devices)} PCIe devices visible", evidence=evidence)
