"""Whether the stack limit is one with which NCCL's threads can start."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.limits import soft_limit
from aphro_core.doctor.versions import read_versions
from aphro_core.remote.remote import Host

ID: Final = "limit.stack"
TITLE: Final = "stack size"
EXPLAIN: Final = """
Reads "Max stack size" in /proc/self/limits. NCCL before 2.28 gives each of its threads a stack of that size: unlimited
means a default so small on some systems that it crashes. PASS when finite or with a newer NCCL, WARN when unlimited
with an older one.
"""
_FIXED_IN: Final = (2, 28)


async def check(host: Host) -> Finding:
    limit, evidence = await soft_limit(host, "Max stack size")
    if limit is not None:
        return Finding(ID, Status.PASS, f"{limit // 1024} KiB of stack", evidence=evidence)
    nccl = (await read_versions(host)).get("NCCL", "")
    if not nccl:
        return Finding(ID, Status.SKIP, "unlimited stack; there is no NCCL that would mind", evidence=evidence)
    if tuple(int(part) for part in nccl.split(".")[:2]) >= _FIXED_IN:
        return Finding(ID, Status.PASS, f"unlimited stack, which NCCL {nccl} can bear", evidence=evidence)
    title = f"unlimited stack, with which threads of NCCL {nccl} may crash"
    return Finding(ID, Status.WARN, title, evidence=evidence, remedy="ulimit -s 8192")
