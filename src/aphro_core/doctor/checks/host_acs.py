"""Whether PCIe access control sends copies between devices up to the root complex."""

from __future__ import annotations

import re
from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.pci import is_virtual, read_accelerators
from aphro_core.remote.remote import NOT_FOUND, Host

ID: Final = "host.acs"
TITLE: Final = "PCIe access control (ACS)"
EXPLAIN: Final = """
Reads the ACSCtl lines of `lspci -vvv` (root only) of the bridges above GPUs and RDMA devices. PASS when none redirects;
WARN for SrcValid+ alone; FAIL for ReqRedir+ or CmpltRedir+ on such a bridge: peer-to-peer copies and GPUDirect RDMA
then make a detour through the root complex or hang. SKIP without such devices, without lspci or root, and in a virtual
machine, where ACS has to stay.
"""


async def check(host: Host) -> Finding:
    devices = await read_accelerators(host)
    if len(devices) < 2:
        return Finding(ID, Status.SKIP, "no two GPUs or RDMA devices here")
    if await is_virtual(host):
        title = "a virtual machine: ACS belongs to its host and has to stay; there, enable ATS"
        return Finding(ID, Status.SKIP, title)
    output = await host.run("lspci", "-D", "-vvv")
    if output.returncode == NOT_FOUND:
        return Finding(ID, Status.SKIP, "lspci is not installed", remedy="apt-get install pciutils")
    controls = read_acs(output.stdout)
    if not controls:
        return Finding(ID, Status.SKIP, "lspci shows no ACSCtl lines: root may read them", remedy="sudo aphro doctor")
    bridges = {bridge for device in devices for bridge in device.bridges}
    return _judge({bdf: line for bdf, line in controls.items() if bdf in bridges})


def _judge(controls: dict[str, Evidence]) -> Finding:
    """``controls``: the ACSCtl lines of the bridges above devices that talk to each other."""
    redirecting = {bdf: line for bdf, line in controls.items() if re.search(r"(Req|Cmplt)Redir\+", line.text)}
    if redirecting:
        title = f"ACS redirects on {len(redirecting)} bridges above GPUs or RDMA devices: {', '.join(redirecting)}"
        commands = "; ".join(f"sudo setpci -s {bdf} ECAP_ACS+0x6.w=0000" for bdf in redirecting)
        remedy = f"{commands} (until the next boot); for good: ACS off in the BIOS, or pci=noacs"
        return Finding(ID, Status.FAIL, title, True, tuple(redirecting.values()), remedy)
    evidence = tuple(controls.values())
    if any("SrcValid+" in line.text for line in evidence):
        return Finding(
            ID, Status.WARN, "ACS checks sources on bridges above GPUs, without redirecting", False, evidence
        )
    title = "no redirection on the bridges above GPUs and RDMA devices"
    return Finding(ID, Status.PASS, title, evidence=evidence)


def read_acs(lspci: str) -> dict[str, Evidence]:
    """Address -> its ACSCtl line, of every device that has one."""
    found: dict[str, Evidence] = {}
    bdf = ""
    for number, line in enumerate(lspci.splitlines(), 1):
        if head := re.match(r"((?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ", line):
            bdf = head[1] if head[1].count(":") == 2 else f"0000:{head[1]}"
        elif "ACSCtl:" in line and bdf:
            found[bdf] = Evidence("lspci -D -vvv", number, f"{bdf} {line.strip()}")
    return found
