"""Whether hosts have names of their own."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status

ID: Final = "name.unique"
TITLE: Final = "host names"
EXPLAIN: Final = """
Compares the names that hosts give themselves (uname -n) and their boot ids. NCCL takes processes with the same host
name (and boot id, in newer versions) for neighbours on one machine and tries shared memory between them. PASS when all
names differ; FAIL when two hosts have the same name; SKIP on one host.
"""


async def check(cluster: Cluster) -> Finding:
    if len(cluster.hosts) == 1:
        return Finding(ID, Status.SKIP, "one host: no name to collide with")
    names: dict[str, list[str]] = {}
    for host in cluster.hosts:
        names.setdefault((await host.run("uname", "-n")).stdout.strip(), []).append(host.name)
    evidence = tuple(Evidence("uname -n", 0, f"{', '.join(hosts)}: {name}") for name, hosts in names.items())
    doubled = {name: hosts for name, hosts in names.items() if len(hosts) > 1}
    if not doubled:
        return Finding(ID, Status.PASS, f"{len(names)} hosts, {len(names)} names", evidence=evidence)
    name, hosts = next(iter(doubled.items()))
    remedy = (
        f"sudo hostnamectl set-hostname <name of its own> on all but one of {', '.join(hosts)}; or export NCCL_HOSTID"
    )
    return Finding(ID, Status.FAIL, f"{' and '.join(hosts)} both call themselves {name}", True, evidence, remedy)
