"""Whether GPU ranks add up over NCCL, by which transports, and how fast: every pair, then all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import NO_GPU, visible_devices
from aphro_core.doctor.live.check import check_live
from aphro_core.doctor.live.live import LiveReport
from aphro_core.doctor.live.nccl import read_live_logs, transports, troubles
from aphro_core.doctor.versions import torch_version

ID: Final = "comm.nccl"
TITLE: Final = "collectives on GPUs (NCCL)"
EXPLAIN: Final = """
Starts a rank on every visible GPU of every host, lets every pair and then all of them all-reduce 8 B, 1 MiB and 64 MiB
and the sizes of a decode step and a prefill chunk, hand tensors over as pipeline stages do, and all-reduce inside a
CUDA graph; each element of each sum is verified. NCCL's own log of the run is kept in memory and read for transports
and warnings. PASS when all sums are right; WARN when a pair is far slower than its link or the others; FAIL for a
wrong sum, an error or a hang, with who is to blame. A hang inside one host is tried again with NCCL_P2P_DISABLE=1.
"""


async def check(cluster: Cluster) -> list[Finding]:
    devices = [await visible_devices(host) for host in cluster.hosts]
    reason = await _reason_to_skip(cluster, devices)
    if reason:
        return [Finding(ID, Status.SKIP, reason)]
    findings, report = await check_live(ID, "NCCL", cluster, devices)
    log = read_live_logs(report, ib=cluster.ib)
    if log is not None:
        findings = [replace(finding, evidence=(*finding.evidence, *transports(log))) for finding in findings]
        findings += troubles(log, has_failed=bool(report.problems))
    return findings + await _try_without_p2p(cluster, report)


async def _reason_to_skip(cluster: Cluster, devices: Sequence[Sequence[str]]) -> str:
    if cluster.live.device == "cpu":
        return "the device is cpu"
    if not any(devices):
        return NO_GPU
    for host, names in zip(cluster.hosts, devices, strict=True):
        version = await torch_version(host) if names else ""
        if names and (not version or version.endswith("+cpu")):
            return f"torch {version or 'is not installed'} on {host.name or 'this host'}: no CUDA build, no NCCL"
    if sum(map(len, devices)) == 1:
        return "one GPU: there is no other to talk to"
    return ""


async def _try_without_p2p(cluster: Cluster, report: LiveReport) -> list[Finding]:
    """Inside one host: whether a pair that got stuck works without peer access, which tells whose fault it is."""
    stuck = [
        outcome.ranks
        for outcome in report.pairs
        if outcome.problem is not None
        and outcome.problem.kind in ("stuck", "wrong")
        and len({report.places[number].host.name for number in outcome.ranks}) == 1
    ]
    if not stuck:
        return []
    places = [report.places[number] for number in stuck[0]]
    live = replace(cluster.live, env={**cluster.live.env, "NCCL_P2P_DISABLE": "1"}, tp=None)
    alone = replace(cluster, hosts=[places[0].host], live=live)
    found, again = await check_live(ID, "NCCL with NCCL_P2P_DISABLE=1", alone, [[place.device for place in places]])
    if again.problems:
        return [replace(finding, root_cause=False) for finding in found]
    title = f"{places[0].label} and {places[1].label} add up with NCCL_P2P_DISABLE=1: the direct path is broken"
    remedy = "look at host.acs and host.iommu; export NCCL_P2P_DISABLE=1 only until the path is repaired"
    evidence = tuple(Evidence("live check", 0, line.text) for finding in found for line in finding.evidence)
    return [Finding(ID, Status.FAIL, title, True, evidence, remedy, places[0].host.name)]
