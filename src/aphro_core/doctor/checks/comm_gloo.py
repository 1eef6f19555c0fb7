"""Whether CPU ranks add up over Gloo: every pair, then all together, on their own processes and with limits."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Finding
from aphro_core.doctor.live.check import check_live

ID: Final = "comm.gloo"
TITLE: Final = "collectives on CPUs (Gloo)"
EXPLAIN: Final = """
Starts a rank on every host (two on a host that is alone), lets every pair and then all of them all-reduce and hand
tensors over with the engine's own groups, and verifies each element of each sum. Ranks meet at the address that the
route to their peers leaves from. PASS when all sums are right, with latency, bandwidth and milliseconds a token; WARN
when a pair is far slower than its link or than the other pairs; FAIL when a sum is wrong, a pair cannot connect, or a
rank says nothing within its limit. A rank that does not even answer a ping is named, with its host.
"""


async def check(cluster: Cluster) -> list[Finding]:
    ranks_each = 2 if len(cluster.hosts) == 1 else 1
    findings, _ = await check_live(ID, "Gloo", cluster, [["cpu"] * ranks_each for _ in cluster.hosts])
    return findings
