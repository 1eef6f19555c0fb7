"""What a container or service may use of the host: memory, cores, processes."""

from __future__ import annotations

from typing import Final

from aphro_core.cgroups import OWN, find_limits, limit_files
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.remote.remote import Host, read

ID: Final = "limit.cgroup"
TITLE: Final = "container limits"
EXPLAIN: Final = """
Reads the limits of memory, processor time and processes of the control groups (v2 and v1) in which a worker would run,
and of those above them, as a worker does. PASS with what they leave, WARN when fewer than 256 further processes and
threads may be started or less than 1 GiB of memory is left, SKIP where control groups cannot be read. A worker that
passes the limit of memory is killed.
"""
_MIN_PIDS: Final = 256
_MIN_BYTES: Final = 1 << 30


async def check(host: Host) -> Finding:
    own = await read(host, OWN) or ""
    texts = {path: text.strip() for path, text in (await host.files(*limit_files(own))).items()}
    if not texts:
        return Finding(ID, Status.SKIP, "no limits of a control group to read")
    limits = find_limits(own, texts)
    evidence = tuple(Evidence(path, 1, text) for path, text in texts.items() if not path.endswith(".stat"))
    memory, pids = limits.memory, limits.pids
    parts = [
        "memory unlimited" if memory is None else f"{memory / 2**30:.1f} GiB of memory left",
        "processes unlimited" if pids is None else f"{pids} more processes and threads",
    ]
    if limits.cores is not None:
        parts.append(f"{limits.cores:.3g} cores")
    if (memory is not None and memory < _MIN_BYTES) or (pids is not None and pids < _MIN_PIDS):
        remedy = "docker run --memory, --pids-limit; systemd: MemoryMax=, TasksMax=; Kubernetes: resources.limits"
        return Finding(ID, Status.WARN, ", ".join(parts), evidence=evidence, remedy=remedy)
    return Finding(ID, Status.PASS, ", ".join(parts), evidence=evidence)
