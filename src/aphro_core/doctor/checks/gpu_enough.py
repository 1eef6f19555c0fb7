"""Whether the GPUs of all hosts together are as many as a start needs."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import NO_GPU, visible_devices

ID: Final = "gpu.enough"
TITLE: Final = "GPUs for -tp and -pp"
EXPLAIN: Final = """
Counts the visible GPUs of all hosts against -tp x -pp. PASS when there are enough; WARN when there are, but a tensor
parallel group would reach across hosts, so that every layer waits for the network; FAIL when there are fewer, with the
sizes that fit. SKIP unless -tp or -pp is given, and without GPUs.
"""


async def check(cluster: Cluster) -> Finding:
    live = cluster.live
    if live.tp is None and live.pp is None:
        return Finding(ID, Status.SKIP, "neither -tp nor -pp is given")
    counts = [len(await visible_devices(host)) for host in cluster.hosts]
    total = sum(counts)
    if not total or live.device == "cpu":
        return Finding(ID, Status.SKIP, NO_GPU if not total else "the device is cpu")
    tp, pp = live.tp or 1, live.pp or 1
    evidence = tuple(
        Evidence("NVML", 0, f"{host.name or 'this host'}: {count} visible GPUs")
        for host, count in zip(cluster.hosts, counts, strict=True)
    )
    if tp * pp > total:
        title = f"-tp {tp} -pp {pp} needs {tp * pp} GPUs, and there are {total}"
        return Finding(ID, Status.FAIL, title, True, evidence, _smaller(counts, tp))
    num_whole = sum(count // tp for count in counts)
    if num_whole < pp:
        title = f"{total} GPUs are enough for -tp {tp} -pp {pp}, but only {num_whole} groups of {tp} lie inside a host"
        return Finding(ID, Status.WARN, title, False, evidence, _smaller(counts, max(counts)))
    return Finding(ID, Status.PASS, f"{total} GPUs, {tp * pp} of them needed", evidence=evidence)


def _smaller(counts: list[int], wanted: int) -> str:
    """The widest tensor parallel size up to ``wanted`` inside hosts, with as many stages as there are groups."""
    tp = min(wanted, max(counts))
    return f"-tp {tp} -pp {sum(count // tp for count in counts)}   # what these hosts hold, each group inside one"
