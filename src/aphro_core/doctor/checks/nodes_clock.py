"""Whether the clocks of all hosts agree."""

from __future__ import annotations

import time
from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status

ID: Final = "nodes.clock"
TITLE: Final = "clocks"
EXPLAIN: Final = """
Asks each host for its time and subtracts half the round trip. Collectives do not need it, but logs, tokens and
certificates do. PASS within a second, WARN up to 30 s, FAIL beyond; SKIP on one host.
"""
_PASS_SECONDS: Final = 1.0
_WARN_SECONDS: Final = 30.0


async def check(cluster: Cluster) -> Finding:
    if len(cluster.hosts) == 1:
        return Finding(ID, Status.SKIP, "one host: one clock")
    offsets = {}
    evidence = []
    for host in cluster.hosts:
        before = time.time()
        text = (await host.run("date", "+%s.%N")).stdout.strip()
        after = time.time()
        offset = float(text) - (before + after) / 2
        doubt = (after - before) / 2
        offsets[host.name] = max(0.0, abs(offset) - doubt)
        evidence.append(Evidence("date +%s.%N", 0, f"{host.name}: {offset:+.2f} s, give or take {doubt:.2f} s"))
    worst = max(offsets, key=lambda name: offsets[name])
    if offsets[worst] < _PASS_SECONDS:
        return Finding(ID, Status.PASS, "all clocks agree within a second", evidence=tuple(evidence))
    status = Status.WARN if offsets[worst] < _WARN_SECONDS else Status.FAIL
    remedy = f"on {worst}: sudo timedatectl set-ntp true, or sudo chronyc makestep"
    return Finding(ID, status, f"the clock of {worst} is off by {offsets[worst]:.1f} s", False, tuple(evidence), remedy)
