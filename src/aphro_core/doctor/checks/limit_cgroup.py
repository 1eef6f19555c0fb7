"""What a container or service may use of the host: memory, cores, processes."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.remote.remote import Host

ID: Final = "limit.cgroup"
TITLE: Final = "container limits"
EXPLAIN: Final = """
Reads memory.max, cpu.max and pids.max of the control group (v2, or v1 where that is mounted) in which a worker would
run. PASS with the limits in words, WARN when fewer than 256 further processes and threads may be started or less than
1 GiB of memory is left, SKIP where control groups cannot be read. A worker that passes memory.max is killed.
"""
_V2: Final = "/sys/fs/cgroup"
_FILES: Final = {
    "memory.max": ("memory.max", "memory/memory.limit_in_bytes"),
    "memory.current": ("memory.current", "memory/memory.usage_in_bytes"),
    "pids.max": ("pids.max", "pids/pids.max"),
    "pids.current": ("pids.current", "pids/pids.current"),
    "cpu.max": ("cpu.max",),
}
_NO_LIMIT: Final = 1 << 60  # v1 writes a huge number
_MIN_PIDS: Final = 256
_MIN_BYTES: Final = 1 << 30


async def check(host: Host) -> Finding:
    texts: dict[str, tuple[str, str]] = {}
    for name, paths in _FILES.items():
        found = await host.files(*(f"{_V2}/{path}" for path in paths))
        if found:
            path, text = next(iter(found.items()))
            texts[name] = (path, text.strip())
    if not texts:
        return Finding(ID, Status.SKIP, "no limits of a control group to read")
    evidence = tuple(Evidence(path, 1, text) for path, text in texts.values())
    memory, pids = _left(texts, "memory"), _left(texts, "pids")
    parts = [
        "memory unlimited" if memory is None else f"{memory / 2**30:.1f} GiB of memory left",
        "processes unlimited" if pids is None else f"{pids} more processes and threads",
    ]
    quota = texts.get("cpu.max", ("", "max"))[1].split()
    if len(quota) == 2 and quota[0] != "max":
        parts.append(f"{int(quota[0]) / int(quota[1]):.3g} cores")
    if (memory is not None and memory < _MIN_BYTES) or (pids is not None and pids < _MIN_PIDS):
        remedy = "docker run --memory, --pids-limit; systemd: MemoryMax=, TasksMax=; Kubernetes: resources.limits"
        return Finding(ID, Status.WARN, ", ".join(parts), evidence=evidence, remedy=remedy)
    return Finding(ID, Status.PASS, ", ".join(parts), evidence=evidence)


def _left(texts: dict[str, tuple[str, str]], name: str) -> int | None:
    limit, used = (texts.get(f"{name}.{what}", ("", ""))[1] for what in ("max", "current"))
    if not limit.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    return int(limit) - int(used) if used.isdigit() else int(limit)
