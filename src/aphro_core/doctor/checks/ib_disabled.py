"""Whether a variable or a missing plug-in keeps NCCL from RDMA."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.environment import read_variables
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.probe import probe
from aphro_core.doctor.rdma import NO_RDMA, natural, read_devices
from aphro_core.remote.remote import Host

ID: Final = "ib.disabled"
TITLE: Final = "RDMA switches and plug-ins"
EXPLAIN: Final = """
Reads NCCL_IB_DISABLE, NCCL_NET, NCCL_NET_PLUGIN and NCCL_IBEXT_DISABLE, and loads libnccl-net.so as NCCL does. PASS
when nothing is switched off; WARN when a plug-in is named that cannot be loaded; FAIL when RDMA is switched off, or
when the devices are EFA, which need the plug-in aws-ofi-nccl, and it is missing. SKIP without RDMA devices.
"""


async def check(host: Host) -> Finding:
    devices = await read_devices(host)
    if not devices:
        return Finding(ID, Status.SKIP, NO_RDMA)
    found = await read_variables(host, "NCCL_IB_DISABLE", "NCCL_NET", "NCCL_NET_PLUGIN", "NCCL_IBEXT_DISABLE")
    evidence = tuple(Evidence(entry.file, entry.line, f"{entry.name}={entry.value}") for entry in found.values())
    off = [entry for entry in found.values() if (entry.name, entry.value) in (
        ("NCCL_IB_DISABLE", "1"), ("NCCL_IBEXT_DISABLE", "1"), ("NCCL_NET", "Socket"))]  # fmt: skip
    if off:
        title = f"{off[0].name}={off[0].value} switches RDMA off ({off[0].file})"
        return Finding(ID, Status.FAIL, title, True, evidence, f"unset {off[0].name}")
    said = await probe(host, "rdma")
    plugin = (*evidence, Evidence(f"dlopen {said['plugin']}", 0, said["plugin_error"] or "loads"))
    if said["plugin_error"] and any(natural(device.name)[0].startswith("efa") for device in devices):
        remedy = "take an image with aws-ofi-nccl (libnccl-net.so), or NCCL_NET_PLUGIN=<its path>"
        return Finding(
            ID, Status.FAIL, "EFA devices, but not the plug-in that NCCL needs for them", True, plugin, remedy
        )
    if said["plugin_error"] and "NCCL_NET_PLUGIN" in found and found["NCCL_NET_PLUGIN"].value != "none":
        title = f"NCCL_NET_PLUGIN={found['NCCL_NET_PLUGIN'].value} cannot be loaded"
        return Finding(ID, Status.WARN, title, False, plugin, "unset NCCL_NET_PLUGIN, or name the file's path")
    words = "no plug-in, and none needed" if said["plugin_error"] else f"plug-in {said['plugin']}"
    return Finding(ID, Status.PASS, f"RDMA is not switched off; {words}", evidence=plugin)
