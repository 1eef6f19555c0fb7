"""Whether a worker may lock memory, which RDMA needs to register its buffers."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.limits import soft_limit
from aphro_core.remote.remote import Host

ID: Final = "limit.memlock"
TITLE: Final = "locked memory"
EXPLAIN: Final = """
Reads "Max locked memory" in /proc/self/limits, of a process started as a worker is, and whether the host has RDMA
devices. A verbs device registers buffers by locking them; at a limit, ibv_reg_mr or ibv_create_qp fails with "Cannot
allocate memory". PASS when unlimited, SKIP when finite without RDMA devices, FAIL when finite with one.
"""
_REMEDY: Final = (
    "docker run --ulimit memlock=-1; else /etc/security/limits.d/rdma.conf: `* soft memlock unlimited` and "
    "`* hard memlock unlimited`; systemd and slurmd: LimitMEMLOCK=infinity; Kubernetes: capability IPC_LOCK"
)


async def check(host: Host) -> Finding:
    limit, evidence = await soft_limit(host, "Max locked memory")
    if limit is None:
        return Finding(ID, Status.PASS, "locked memory is unlimited", evidence=evidence)
    title = f"{limit // 1024} KiB may be locked"
    if not await host.links("/sys/class/infiniband/*"):
        return Finding(ID, Status.SKIP, f"{title}; without RDMA devices nothing needs more", evidence=evidence)
    title = f"{title}, but RDMA devices register their buffers by locking them"
    return Finding(ID, Status.FAIL, title, root_cause=True, evidence=evidence, remedy=_REMEDY)
