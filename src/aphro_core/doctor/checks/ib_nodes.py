"""Whether processes may open the RDMA devices."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.probe import probe
from aphro_core.doctor.rdma import NO_RDMA, read_devices
from aphro_core.remote.remote import Host

ID: Final = "ib.nodes"
TITLE: Final = "RDMA device files"
EXPLAIN: Final = """
Opens /dev/infiniband/uverbsN for each device of /sys/class/infiniband_verbs. PASS when all open; WARN when some do;
FAIL when none does: ENOENT (not passed into the container), EACCES (permissions), EPERM (the container's device rules).
SKIP without RDMA devices.
"""
_REMEDY: Final = (
    "docker run --device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1 --network host; "
    "Kubernetes: a resource of the RDMA device plug-in"
)


async def check(host: Host) -> Finding:
    if not await read_devices(host):
        return Finding(ID, Status.SKIP, NO_RDMA)
    nodes: dict[str, str] = (await probe(host, "rdma"))["nodes"]
    evidence = tuple(Evidence(f"/dev/infiniband/{name}", 0, error or "opens") for name, error in nodes.items())
    failed = {name: error for name, error in nodes.items() if error}
    if nodes and not failed:
        return Finding(ID, Status.PASS, f"all {len(nodes)} device files open", evidence=evidence)
    words = ", ".join(f"{name} {error}" for name, error in failed.items()) or "there are none"
    is_total = len(failed) == len(nodes)
    status = Status.FAIL if is_total else Status.WARN
    return Finding(ID, status, f"device files that do not open: {words}", is_total, evidence, _REMEDY)
