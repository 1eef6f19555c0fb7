"""Whether containers on one machine share what their ranks need to talk through memory."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.remote.remote import read

ID: Final = "shm.shared"
TITLE: Final = "shared memory between containers"
EXPLAIN: Final = """
Compares boot ids and the device number of /dev/shm. "Hosts" with one boot id are containers on one machine: without a
common /dev/shm and IPC namespace their ranks talk over the network, and NVLink between them idles. PASS when they share
it or are different machines; WARN when they do not; SKIP on one host.
"""


async def check(cluster: Cluster) -> Finding:
    if len(cluster.hosts) == 1:
        return Finding(ID, Status.SKIP, "one host: it shares with itself")
    machines: dict[str, dict[str, str]] = {}
    for host in cluster.hosts:
        boot = await read(host, "/proc/sys/kernel/random/boot_id") or host.name
        device = (await host.run("stat", "-c", "%d", "/dev/shm")).stdout.strip()
        machines.setdefault(boot, {})[host.name] = device
    evidence = tuple(
        Evidence("/dev/shm", 0, f"{name}: boot id {boot}, device {device}")
        for boot, devices in machines.items()
        for name, device in devices.items()
    )
    apart = next((devices for devices in machines.values() if len(set(devices.values())) > 1), None)
    if apart is None:
        return Finding(ID, Status.PASS, f"{len(machines)} machines, none split by containers", evidence=evidence)
    title = f"{' and '.join(apart)} are containers of one machine that do not share /dev/shm"
    remedy = "one container a machine; or --ipc=host on each, or a common volume on /dev/shm"
    return Finding(ID, Status.WARN, title, evidence=evidence, remedy=remedy)
