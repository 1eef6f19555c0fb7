"""Who holds the memory of the GPUs."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import Gpu, read_gpus
from aphro_core.remote.remote import Host, read

ID: Final = "gpu.busy"
TITLE: Final = "GPU memory in use"
EXPLAIN: Final = """
Lists the processes that hold memory of each GPU, as NVML sees them, with their command lines. PASS when less than 3 %
of a GPU is in use; WARN with the holders otherwise. Processes of other containers have no name here, and a process
that died may leave memory behind for a moment. WARN, too, where a process that starts there shares its GPUs by MPS (the
daemon's pipe in CUDA_MPS_PIPE_DIRECTORY or /tmp/nvidia-mps, or a share of threads): processes run on a GPU side by side
then, and aphro, which asks the same, leaves out the kernels whose programs must all run at once (a layer in one launch,
for few rows). An MPS server whose pipe is elsewhere is a holder like any other.
"""
_SHARE: Final = 0.03  # what driver and display take by themselves


async def check(host: Host) -> Finding:
    gpus = await read_gpus(host)
    if gpus.error:
        return Finding(ID, Status.SKIP, gpus.error)
    busy = [gpu for gpu in gpus.gpus if gpu.used_bytes > _SHARE * gpu.total_bytes]
    evidence = [line for gpu in busy for line in await _holders(host, gpu)]
    if gpus.mps is not None:
        title = f"GPUs are shared by MPS ({gpus.mps}): decode steps of few rows are slower"
        if busy:
            title += f"; {len(busy)} of {len(gpus.gpus)} hold memory of others"
        remedy = "echo quit | nvidia-cuda-mps-control, if nothing else needs it"
        return Finding(ID, Status.WARN, title, evidence=tuple(evidence), remedy=remedy)
    if not busy:
        free = min((gpu.total_bytes - gpu.used_bytes for gpu in gpus.gpus), default=0)
        return Finding(ID, Status.PASS, f"all GPUs are free, {free / 2**30:.1f} GiB or more each")
    title = f"{len(busy)} of {len(gpus.gpus)} GPUs hold memory of others; {evidence[0].text}"
    remedy = "end the holders by their pid, or leave those GPUs out with CUDA_VISIBLE_DEVICES"
    return Finding(ID, Status.WARN, title, evidence=tuple(evidence), remedy=remedy)


async def _holders(host: Host, gpu: Gpu) -> list[Evidence]:
    where = f"GPU {gpu.index}: {gpu.used_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB"
    lines = []
    for process in gpu.processes:
        command = (await read(host, f"/proc/{process.pid}/cmdline") or "").replace("\0", " ").strip()
        name = f"{command[:120]!r}" if command else "of another container"
        lines.append(Evidence("NVML", 0, f"{where}, pid {process.pid} {name} holds {process.bytes / 2**30:.1f} GiB"))
    return lines or [Evidence("NVML", 0, f"{where} in use, by a process that is not visible from here")]
