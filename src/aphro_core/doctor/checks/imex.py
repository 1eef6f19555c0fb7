"""Whether hosts of one NVLink rack share their fabric."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.check import Cluster
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import read_gpus

ID: Final = "imex"
TITLE: Final = "NVLink across hosts (IMEX)"
EXPLAIN: Final = """
For racks of the GB200 class: compares the fabric's UUID and clique of all GPUs on all hosts, and looks for
/dev/nvidia-caps-imex-channels. PASS when they are equal and the channels are there; WARN when hosts are of different
fabrics or cliques; FAIL when a GPU has a fabric but no channel is there to use it; SKIP without such GPUs, and on one
host, whose GPUs need no channel among themselves.
"""
_REMEDY: Final = "nvidia-imex-ctl -N on every host; permissions of /dev/nvidia-caps-imex-channels; NCCL_MNNVL_ENABLE=0"


async def check(cluster: Cluster) -> Finding:
    if len(cluster.hosts) == 1:
        return Finding(ID, Status.SKIP, "one host: no NVLink between hosts to look at")
    evidence, cliques, without = [], set(), []
    for host in cluster.hosts:
        gpus = await read_gpus(host)
        found = {(gpu.fabric.uuid, gpu.fabric.clique) for gpu in gpus.gpus if gpu.fabric and gpu.fabric.uuid.strip("0")}
        if not found:
            continue
        cliques |= found
        channels = await host.links("/dev/nvidia-caps-imex-channels/channel*")
        evidence += [Evidence("NVML", 0, f"{host.name}: fabric {uuid}, clique {clique}, {len(channels)} channels")
                     for uuid, clique in sorted(found)]  # fmt: skip
        without += [] if channels else [host.name or "this host"]
    if not cliques:
        return Finding(ID, Status.SKIP, "no GPU here has NVLink beyond its host")
    if without:
        title = f"no IMEX channel on {', '.join(without)}: NVLink between hosts cannot be used"
        return Finding(ID, Status.FAIL, title, True, tuple(evidence), _REMEDY)
    if len(cliques) > 1:
        return Finding(ID, Status.WARN, "hosts of different NVLink fabrics", False, tuple(evidence), _REMEDY)
    return Finding(ID, Status.PASS, "all GPUs are of one NVLink fabric", evidence=tuple(evidence))
