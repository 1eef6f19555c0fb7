"""Whether Amazon's network devices are usable: driver, provider, and as many as the kernel has."""

from __future__ import annotations

import re
from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.rdma import read_devices
from aphro_core.remote.remote import NOT_FOUND, Host

ID: Final = "efa"
TITLE: Final = "EFA"
EXPLAIN: Final = """
Counts RDMA devices of the driver efa and asks `fi_info -p efa` for its provider. PASS when the provider sees them all;
WARN when it sees fewer, or when fi_info is not installed; FAIL when it sees none. SKIP without EFA devices.
"""
_REMEDY: Final = (
    "pass every /dev/infiniband/uverbsN into the container; a security group that allows all traffic from and to "
    "itself; the provider is part of the EFA installer"
)


async def check(host: Host) -> Finding:
    drivers = await host.links("/sys/class/infiniband/*/device/driver")
    devices = [path.split("/")[4] for path, driver in drivers.items() if driver.endswith("/efa")]
    devices = devices or [device.name for device in await read_devices(host) if device.name.startswith("efa")]
    if not devices:
        return Finding(ID, Status.SKIP, "no EFA device here")
    output = await host.run("fi_info", "-p", "efa")
    if output.returncode == NOT_FOUND:
        title = f"{len(devices)} EFA devices; fi_info is not installed, so the provider is not checked"
        return Finding(ID, Status.WARN, title, remedy="install libfabric's tools with the EFA installer")
    domains = set(re.findall(r"domain: (\S+?)-(?:rdm|dgrm)", output.stdout))
    evidence = (Evidence("fi_info -p efa", 0, ", ".join(sorted(domains)) or output.stderr.strip()),)
    if not domains:
        return Finding(ID, Status.FAIL, f"{len(devices)} EFA devices, none for the provider", True, evidence, _REMEDY)
    if len(domains) < len(devices):
        title = f"the provider sees {len(domains)} of {len(devices)} EFA devices"
        return Finding(ID, Status.WARN, title, False, evidence, _REMEDY)
    return Finding(ID, Status.PASS, f"{len(devices)} EFA devices with their provider", evidence=evidence)
