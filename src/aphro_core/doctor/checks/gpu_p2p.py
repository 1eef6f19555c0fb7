"""Whether data copied from GPU to GPU arrives, and arrives whole."""

from __future__ import annotations

from typing import Any, Final

import anyio
import msgspec

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import NO_GPU, visible_devices
from aphro_core.doctor.versions import torch_version
from aphro_core.remote.remote import Host, Process

ID: Final = "gpu.p2p"
TITLE: Final = "copies between GPUs"
EXPLAIN: Final = """
Copies a pattern of 64 MiB between each pair of visible GPUs in both directions and compares every element, in a process
that is killed when a pair says nothing for 10 s. PASS when all arrive whole, with their rate; WARN when the driver
offers no peer access between two (the copy goes through host memory; normal for many PCIe cards); FAIL for wrong
data or a hang: PCIe access control (ACS) or an IOMMU that translates between the cards is the first suspect.
NCCL_P2P_DISABLE=1 works around it and costs speed: it is a test, not an answer.
"""
LIMIT_SECONDS: Final = 300.0  # with its own limits inside
_START_SECONDS: Final = 60.0  # torch and a CUDA context
_PAIR_SECONDS: Final = 10.0
_REMEDY: Final = (
    "aphro doctor --only host.acs,host.iommu,gpu.topology; NCCL_P2P_DISABLE=1 works around it until ACS or IOMMU is off"
)


async def check(host: Host) -> Finding:
    devices = await visible_devices(host)
    if len(devices) < 2:
        return Finding(ID, Status.SKIP, "one GPU: no pair to copy between" if devices else NO_GPU)
    if not (version := await torch_version(host)) or version.endswith("+cpu"):
        return Finding(ID, Status.SKIP, f"torch {version or 'is not installed'}: no CUDA build to copy with")
    async with host.start(host.python, "-m", "aphro_core.doctor.probes.p2p") as process:
        return await _follow(process)


async def _follow(process: Process) -> Finding:
    evidence: list[Evidence] = []
    no_peers, wrong, pair = [], [], "the start of CUDA"
    seconds = _START_SECONDS
    while True:
        try:
            with anyio.fail_after(seconds):
                line = await process.receive_line()
        except TimeoutError:
            title = f"{pair}: the copy hangs ({seconds:g} s)"
            return Finding(ID, Status.FAIL, title, root_cause=True, evidence=tuple(evidence), remedy=_REMEDY)
        if line is None:
            break
        said: dict[str, Any] = msgspec.json.decode(line)
        if "source" in said:
            pair, seconds = f"GPU {said['source']} -> GPU {said['target']}", _PAIR_SECONDS
            no_peers += [] if said["is_peer"] else [pair]
        elif "is_right" in said:
            wrong += [] if said["is_right"] else [pair]
            rate = f"{said['bytes_per_second'] / 1e9:.1f} GB/s"
            evidence.append(Evidence("copy of 64 MiB", 0, f"{pair}: {'' if said['is_right'] else 'WRONG, '}{rate}"))
    if (code := await process.wait()) != 0:
        words = (process.stderr_tail.splitlines() or ["no word"])[-1]
        title = f"{pair}: the copy ended with code {code}: {words}"
        return Finding(ID, Status.FAIL, title, root_cause=True, evidence=tuple(evidence), remedy=_REMEDY)
    return _judge(tuple(evidence), no_peers, wrong)


def _judge(evidence: tuple[Evidence, ...], no_peers: list[str], wrong: list[str]) -> Finding:
    if wrong:
        title = f"what is copied arrives damaged: {', '.join(wrong)}"
        return Finding(ID, Status.FAIL, title, root_cause=True, evidence=evidence, remedy=_REMEDY)
    if no_peers:
        title = f"copies are right; no peer access for {len(no_peers)} of {len(evidence)}: they go through host memory"
        remedy = "nvidia-smi topo -p2p r; GPUs without NVLink in different sockets or virtual machines often have none"
        return Finding(ID, Status.WARN, title, evidence=evidence, remedy=remedy)
    slowest = min(evidence, key=lambda line: float(line.text.split()[-2]))
    return Finding(ID, Status.PASS, f"{len(evidence)} copies are right, the slowest {slowest.text}", evidence=evidence)
