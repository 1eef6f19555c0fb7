"""How the GPUs of a host are joined: by NVLink, by PCIe switches, or across sockets."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import Gpu, GpuPair, read_gpus
from aphro_core.remote.remote import Host

ID: Final = "gpu.topology"
TITLE: Final = "paths between GPUs"
EXPLAIN: Final = """
Asks NVML for each pair of GPUs: NVLinks between them or to a common NVSwitch (NV#), one PCIe switch (PIX), several
(PXB), the host bridge (PHB), the bridges of one socket (NODE), or the link between sockets (SYS). PASS when every pair
has NVLink; WARN otherwise, with the slowest pair: keep a tensor-parallel group inside an NVLink island or a socket and
put pipeline stages across. No fault by itself: cards without NVLink have no better path.
"""
_ORDER: Final = ["PIX", "PXB", "PHB", "NODE", "SYS", "unknown"]


async def check(host: Host) -> Finding:
    gpus = await read_gpus(host)
    if gpus.error:
        return Finding(ID, Status.SKIP, gpus.error)
    if not gpus.pairs:
        return Finding(ID, Status.SKIP, "one GPU: no pair to look at")
    names = {(pair.first, pair.second): path_of(pair, gpus.gpus) for pair in gpus.pairs}
    evidence = tuple(Evidence("NVML", 0, f"GPU {a} - GPU {b}: {name}") for (a, b), name in names.items())
    slow = {pair: name for pair, name in names.items() if not name.startswith("NV")}
    if not slow:
        return Finding(ID, Status.PASS, f"NVLink between all {len(gpus.gpus)} GPUs", evidence=evidence)
    (a, b), worst = max(slow.items(), key=lambda item: _ORDER.index(item[1]))
    title = f"{len(slow)} of {len(names)} pairs without NVLink; the slowest is GPU {a} - GPU {b} by {worst}"
    remedy = "-tp inside an NVLink island or a socket (CUDA_VISIBLE_DEVICES orders the GPUs), -pp across"
    return Finding(ID, Status.WARN, title, evidence=evidence, remedy=remedy)


def path_of(pair: GpuPair, gpus: list[Gpu]) -> str:
    """As `nvidia-smi topo -m` writes it: NV and the number of links, or the PCIe level.

    Behind an NVSwitch links lead to the switch: then it is the driver's word that the pair talks by NVLink that counts.
    """
    if pair.num_nvlinks:
        return f"NV{pair.num_nvlinks}"
    if pair.p2p.get("nvlink"):
        return f"NV{min(gpus[pair.first].num_nvlinks, gpus[pair.second].num_nvlinks)}"
    return pair.level
