"""Whether PCIe access control or an IOMMU stands between GPUs and network cards."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from aphro_core.doctor.checks import host_acs, host_iommu
from aphro_core.doctor.finding import Finding, Status, sort_findings
from aphro_core.doctor.pci import read_accelerators
from aphro_core.remote.remote import Host

ID: Final = "gdr.acs"
TITLE: Final = "ACS and IOMMU between GPUs and cards"
EXPLAIN: Final = """
The findings of host.acs and host.iommu, where GPUs and RDMA devices are both there: redirected or translated, GPUDirect
RDMA is slow or ends in completion error 4 (local protection). PASS, WARN and FAIL as there; SKIP without both kinds.
"""


async def check(host: Host) -> Finding:
    kinds = {device.kind for device in await read_accelerators(host)}
    if kinds != {"gpu", "rdma"}:
        return Finding(ID, Status.SKIP, "no GPU and RDMA device side by side")
    found = [await host_acs.check(host), await host_iommu.check(host)]
    return replace(sort_findings(found)[0], id=ID)
