"""Whether segments of dead processes fill /dev/shm."""

from __future__ import annotations

import shlex
from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.remote.remote import Host

ID: Final = "shm.stale"
TITLE: Final = "left-over shared memory"
EXPLAIN: Final = """
Lists /dev/shm/nccl-* and looks for processes that map them (/proc/*/maps). NCCL removes its segments as soon as both
ends are attached, so one that nobody maps belongs to a job that died. PASS without any, WARN with the line that removes
them. Segments of processes that may not be read from here are left out.
"""
_MAPPED: Final = "grep -hoE '/dev/shm/nccl-[[:alnum:]]+' /proc/[0-9]*/maps 2>/dev/null | sort -u"


async def check(host: Host) -> Finding:
    segments = list(await host.links("/dev/shm/nccl-*"))
    if not segments:
        return Finding(ID, Status.PASS, "no segments of NCCL are left over")
    mapped = (await host.run("sh", "-c", _MAPPED)).stdout.split()
    stale = [path for path in segments if path not in mapped]
    if not stale:
        return Finding(ID, Status.PASS, f"{len(segments)} segments of NCCL, all in use")
    title = f"{len(stale)} segments in /dev/shm that no process maps"
    evidence = tuple(Evidence(path, 0, "no process maps it") for path in stale[:10])
    remedy = f"if no NCCL job is starting right now: rm {' '.join(map(shlex.quote, stale))}"
    return Finding(ID, Status.WARN, title, evidence=evidence, remedy=remedy)
