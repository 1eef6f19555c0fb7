"""Whether collectives between hosts really go over RDMA, and whether straight to GPU memory."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.checks.ib_errors import judge_growth, read_counters
from aphro_core.doctor.finding import Finding, Status
from aphro_core.doctor.gpus import NO_GPU, visible_devices
from aphro_core.doctor.live.check import check_live
from aphro_core.doctor.live.live import LiveReport
from aphro_core.doctor.live.nccl import read_live_logs, transports, troubles

ID: Final = "ib.traffic"
TITLE: Final = "RDMA traffic between hosts"
EXPLAIN: Final = """
Lets a GPU of each host all-reduce with those of the others over NCCL, and reads in NCCL's own log which transport every
channel took. It ends in one sentence: GPUDirect RDMA (PASS), RDMA without GPUDirect (WARN), TCP sockets (FAIL), or not
shown (SKIP). Error counters of RDMA ports that grow meanwhile are a failure of ib.errors. SKIP on one host or without
GPUs. Deeper: ib_write_bw -d HCA --use_cuda=G on both ends (perftest).
"""


async def check(cluster: Cluster) -> list[Finding]:
    if len(cluster.hosts) == 1:
        return [Finding(ID, Status.SKIP, "one host: no traffic between hosts; name others with --hosts")]
    devices = [(await visible_devices(host))[:1] for host in cluster.hosts]
    if not all(devices) or cluster.live.device == "cpu":
        return [Finding(ID, Status.SKIP, NO_GPU)]
    before = [await read_counters(host) for host in cluster.hosts]
    findings, report = await check_live(ID, "NCCL", cluster, devices)
    errors = [
        judge_growth(counts, await read_counters(host), " during the traffic between hosts", host.name)
        for host, counts in zip(cluster.hosts, before, strict=True)
    ]
    return [*_judge(findings, report), *(error for error in errors if error is not None)]


def _judge(findings: list[Finding], report: LiveReport) -> list[Finding]:
    """The sentence, and what NCCL's log finds fault with."""
    log = read_live_logs(report, ib=True)
    if log is None or not log.paths:
        failed = [finding for finding in findings if finding.status is Status.FAIL]
        return failed or [Finding(ID, Status.SKIP, "not shown: NCCL's log names no transport")]
    between = [path for path in log.paths if path.via.startswith(("NET/", "P2P/MNNVL"))]
    sockets = [path for path in between if "Socket" in path.via]
    bare = [path for path in between if path.gdr is False and path not in sockets]
    status, words = Status.PASS, "GPUDirect RDMA"
    if sockets:
        status, words = Status.FAIL, "TCP sockets"
    elif bare:
        status, words = Status.WARN, "RDMA without GPUDirect"
    elif not between:
        status, words = Status.SKIP, "not shown: no channel between hosts in NCCL's log"
    remedies = [finding.remedy for finding in troubles(log) if finding.remedy]
    remedy = remedies[0] if remedies and status is not Status.PASS else ""
    return [Finding(ID, status, words, status is Status.FAIL, transports(log), remedy), *troubles(log)]
