"""Whether an IOMMU translates what devices send to each other."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.pci import read_accelerators
from aphro_core.remote.remote import Host, read

ID: Final = "host.iommu"
TITLE: Final = "IOMMU"
EXPLAIN: Final = """
Reads /sys/class/iommu, the types of /sys/kernel/iommu_groups and the kernel's command line. PASS when no IOMMU is
active, when it passes through (iommu=pt, groups of type identity), or when nothing here needs copies between devices;
WARN when it translates and there are several GPUs or RDMA devices: peer-to-peer copies then go through the root
complex, are slow, or hang.
"""


async def check(host: Host) -> Finding:
    units = await host.links("/sys/class/iommu/*")
    command_line = await read(host, "/proc/cmdline") or ""
    evidence = [Evidence("/proc/cmdline", 1, word) for word in command_line.split() if "iommu" in word]
    if not units:
        return Finding(ID, Status.PASS, "no IOMMU is active", evidence=tuple(evidence))
    kinds = {text.strip() for text in (await host.files("/sys/kernel/iommu_groups/*/type")).values()}
    evidence += [Evidence("/sys/kernel/iommu_groups/*/type", 0, ", ".join(sorted(kinds)))] if kinds else []
    found = tuple(evidence)
    if kinds == {"identity"} or (not kinds and "iommu=pt" in command_line):
        return Finding(ID, Status.PASS, "the IOMMU passes through", evidence=found)
    devices = await read_accelerators(host)
    if len(devices) < 2:
        return Finding(
            ID, Status.SKIP, "an IOMMU translates; no two devices here that would talk directly", evidence=found
        )
    title = f"an IOMMU translates between {len(devices)} GPUs and RDMA devices"
    remedy = "add iommu=pt to the kernel's command line (intel_iommu=off or amd_iommu=off where allowed), reboot"
    return Finding(ID, Status.WARN, title, evidence=found, remedy=remedy)
