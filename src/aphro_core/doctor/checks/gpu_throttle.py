"""Whether a GPU is held back by heat, power or the driver's settings."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import read_gpus
from aphro_core.remote.remote import Host

ID: Final = "gpu.throttle"
TITLE: Final = "GPU clocks"
EXPLAIN: Final = """
Reads the reasons for which NVML says that clocks are held back right now, and persistence mode. PASS without any; WARN
for a thermal slowdown, a hardware slowdown or the power brake (one such GPU slows its whole group), and when
persistence mode is off, which costs seconds at each start. A power cap under load is normal and only mentioned.
"""


async def check(host: Host) -> Finding:
    gpus = await read_gpus(host)
    if gpus.error:
        return Finding(ID, Status.SKIP, gpus.error)
    evidence = tuple(
        Evidence("NVML", 0, f"GPU {gpu.index}: {', '.join(gpu.throttling) or 'clocks free'}, {gpu.temperature} C"
                 + (", at its power cap" if gpu.is_power_capped else ""))
        for gpu in gpus.gpus
    )  # fmt: skip
    held = [f"GPU {gpu.index} ({', '.join(gpu.throttling)})" for gpu in gpus.gpus if gpu.throttling]
    if held:
        remedy = "nvidia-smi -q -d PERFORMANCE,TEMPERATURE; look at fans, inlet air and power supplies"
        return Finding(ID, Status.WARN, f"held back: {', '.join(held)}", evidence=evidence, remedy=remedy)
    loose = [str(gpu.index) for gpu in gpus.gpus if gpu.persistence == 0]
    if loose:
        title = f"clocks free; persistence mode is off on GPU {', '.join(loose)}"
        return Finding(ID, Status.PASS, title, evidence=evidence, remedy="sudo nvidia-smi -pm 1")
    return Finding(ID, Status.PASS, "no GPU is held back", evidence=evidence)
