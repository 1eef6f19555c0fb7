"""Whether /dev/shm has room for the buffers that ranks of one host share."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.remote.remote import Host

ID: Final = "shm.size"
TITLE: Final = "shared memory"
EXPLAIN: Final = """
Reads the size and the free space of /dev/shm (df). Ranks of one host that have no direct path between their GPUs talk
through it: NCCL takes about 10 MB a channel and pair, and dies with "No space left on device" or a bus error.
PASS from 1 GiB free on, WARN below it, FAIL below 64 MiB or when there is none. Docker gives a container 64 MB.
"""
_WANTED_BYTES: Final = 1 << 30
_NEEDED_BYTES: Final = 64 << 20
_REMEDY: Final = "docker run --shm-size=16g (or --ipc=host); Kubernetes: an emptyDir with medium: Memory on /dev/shm"


async def check(host: Host) -> Finding:
    output = await host.run("df", "-P", "-B1", "/dev/shm")
    lines = output.stdout.splitlines()
    if output.returncode or len(lines) < 2:
        return Finding(ID, Status.FAIL, "there is no /dev/shm", evidence=_evidence(output.stderr), remedy=_REMEDY)
    size, free = (int(word) for word in (lines[1].split()[1], lines[1].split()[3]))
    title = f"/dev/shm: {free / 2**30:.2f} of {size / 2**30:.2f} GiB free"
    evidence = _evidence(lines[1])
    if free >= _WANTED_BYTES:
        return Finding(ID, Status.PASS, title, evidence=evidence)
    status = Status.WARN if free >= _NEEDED_BYTES else Status.FAIL
    return Finding(ID, status, f"{title}, less than 1 GiB", evidence=evidence, remedy=_REMEDY)


def _evidence(text: str) -> tuple[Evidence, ...]:
    return (Evidence("df -P -B1 /dev/shm", 0, text.strip()),)
