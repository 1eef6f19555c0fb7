"""Whether the GPUs that processes may see are there, once each, and of one kind."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.environment import read_variables
from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import read_gpus
from aphro_core.remote.remote import Host

ID: Final = "gpu.count"
TITLE: Final = "visible GPUs"
EXPLAIN: Final = """
Compares CUDA_VISIBLE_DEVICES with the GPUs that NVML lists. PASS when every named GPU exists, once; WARN when the
list names one twice or when GPUs of different compute capability would form one group (the slowest sets the pace, and
kernels are built for the lowest); FAIL when it names one that does not exist: CUDA silently drops it and all behind it.
"""


async def check(host: Host) -> Finding:
    gpus = await read_gpus(host)
    if gpus.error:
        return Finding(ID, Status.SKIP, gpus.error)
    variable = (await read_variables(host, "CUDA_VISIBLE_DEVICES")).get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        names = [str(gpu.index) for gpu in gpus.gpus]
        evidence = tuple(Evidence("NVML", 0, f"GPU {gpu.index}: {gpu.name}") for gpu in gpus.gpus)
    else:
        names = [name.strip() for name in variable.value.split(",") if name.strip()]
        evidence = (Evidence(variable.file, variable.line, f"CUDA_VISIBLE_DEVICES={variable.value}"),)
    unknown = [name for name in names if not _exists(name, len(gpus.gpus), [gpu.uuid for gpu in gpus.gpus])]
    remedy = f"export CUDA_VISIBLE_DEVICES={','.join(str(gpu.index) for gpu in gpus.gpus)}"
    if unknown:
        title = f"CUDA_VISIBLE_DEVICES names {', '.join(unknown)}, but there are {len(gpus.gpus)} GPUs"
        return Finding(ID, Status.FAIL, title, root_cause=True, evidence=evidence, remedy=remedy)
    if len(set(names)) < len(names):
        return Finding(ID, Status.WARN, "CUDA_VISIBLE_DEVICES names a GPU twice", evidence=evidence, remedy=remedy)
    kinds = {(gpu.name, tuple(gpu.capability)) for gpu in gpus.gpus}
    if len(kinds) > 1:
        title = f"GPUs of different kinds: {', '.join(sorted(name for name, _ in kinds))}"
        return Finding(ID, Status.WARN, title, evidence=evidence, remedy="group equal GPUs by CUDA_VISIBLE_DEVICES")
    return Finding(ID, Status.PASS, f"{len(names)} of {len(gpus.gpus)} GPUs visible", evidence=evidence)


def _exists(name: str, num_gpus: int, uuids: list[str]) -> bool:
    if name.isdigit():
        return int(name) < num_gpus
    return any(uuid.startswith(name) for uuid in uuids) or name.startswith("MIG-")
