"""Whether a worker may open the files and sockets that a large group needs."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.gpus import has_gpu_files
from aphro_core.doctor.limits import soft_limit
from aphro_core.remote.remote import Host

ID: Final = "limit.nofile"
TITLE: Final = "open files"
EXPLAIN: Final = """
Reads "Max open files" in /proc/self/limits, of a process started as a worker is. NCCL opens sockets for each peer and
channel, and file descriptors for shared GPU memory. PASS from 16384 on, which is ample for hundreds of ranks (for
thousands NVIDIA asks for 65536); below it WARN on a host with GPUs and SKIP on one without; FAIL below 1024 with GPUs.
"""
_WANTED: Final = 16384
_NEEDED: Final = 1024
_REMEDY: Final = "/etc/security/limits.d/nofile.conf: `* - nofile 131072`; systemd: LimitNOFILE=131072"


async def check(host: Host) -> Finding:
    limit, evidence = await soft_limit(host, "Max open files")
    if limit is None or limit >= _WANTED:
        return Finding(ID, Status.PASS, f"{limit or 'unlimited'} open files", evidence=evidence)
    if not await has_gpu_files(host):
        return Finding(ID, Status.SKIP, f"{limit} open files; without GPUs nothing needs more", evidence=evidence)
    status = Status.WARN if limit >= _NEEDED else Status.FAIL
    return Finding(ID, status, f"only {limit} open files", evidence=evidence, remedy=_REMEDY)
