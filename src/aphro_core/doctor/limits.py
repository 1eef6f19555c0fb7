"""Resource limits of a process that is started on a host as a worker would be."""

from __future__ import annotations

from aphro_core.doctor.finding import Evidence
from aphro_core.errors import AphroError
from aphro_core.remote.remote import Host


async def soft_limit(host: Host, name: str) -> tuple[int | None, tuple[Evidence, ...]]:
    """The soft limit called ``name`` in /proc/self/limits, None if unlimited, with the line that says so."""
    output = await host.run("cat", "/proc/self/limits")
    for number, line in enumerate(output.stdout.splitlines(), 1):
        if line.startswith(name):
            value = line.removeprefix(name).split()[0]
            evidence = (Evidence("/proc/self/limits", number, " ".join(line.split())),)
            return None if value == "unlimited" else int(value), evidence
    raise AphroError(f"/proc/self/limits has no line {name!r}", hint="mount /proc")
