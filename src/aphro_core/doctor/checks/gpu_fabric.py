"""Whether GPUs on NVSwitch have been joined to their fabric."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import read_gpus
from aphro_core.remote.remote import Host

ID: Final = "gpu.fabric"
TITLE: Final = "NVSwitch fabric"
EXPLAIN: Final = """
Reads each GPU's fabric registration from NVML, and whether nvidia-fabricmanager runs where systemd can be asked. PASS
when it has completed with success; SKIP without NVSwitch; WARN while it is in progress; FAIL when it ended in an error:
CUDA then fails with "system not yet initialized" or P2P is off between GPUs that have NVLink.
"""
_REMEDY: Final = "sudo systemctl enable --now nvidia-fabricmanager, of exactly the driver's version; then its journal"
_COMPLETED: Final = 3


async def check(host: Host) -> Finding:
    gpus = await read_gpus(host)
    if gpus.error:
        return Finding(ID, Status.SKIP, gpus.error)
    states = {gpu.index: gpu.fabric for gpu in gpus.gpus if gpu.fabric is not None and gpu.fabric.state}
    if not states:
        return Finding(ID, Status.SKIP, "no GPU here belongs to an NVSwitch fabric")
    evidence = [
        Evidence("NVML", 0, f"GPU {index}: fabric state {fabric.state} (3 is completed), status {fabric.status}")
        for index, fabric in states.items()
    ]
    service = (await host.run("systemctl", "is-active", "nvidia-fabricmanager")).stdout.strip()
    if service:
        evidence.append(Evidence("systemctl is-active nvidia-fabricmanager", 0, service))
    found = tuple(evidence)
    if any(fabric.state == _COMPLETED and fabric.status for fabric in states.values()):
        return Finding(ID, Status.FAIL, "the fabric registration ended in an error", True, found, _REMEDY)
    if any(fabric.state != _COMPLETED for fabric in states.values()):
        return Finding(ID, Status.WARN, "GPUs are still waiting for the fabric manager", True, found, _REMEDY)
    return Finding(ID, Status.PASS, f"{len(states)} GPUs have joined the NVSwitch fabric", evidence=found)
