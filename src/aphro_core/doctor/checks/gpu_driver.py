"""Whether the NVIDIA driver is loaded and its management library answers."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import read_gpus
from aphro_core.doctor.versions import torch_version
from aphro_core.remote.remote import Host, read

ID: Final = "gpu.driver"
TITLE: Final = "GPU driver"
EXPLAIN: Final = """
Reads /proc/driver/nvidia/version and asks NVML, in a process that is killed when the driver hangs. PASS when both
answer; SKIP without a GPU; FAIL when the kernel has the driver but NVML fails ("Driver/library version mismatch" after
an update), when the devices are there but the driver is not, or when torch was built for CUDA and a PCI device of
NVIDIA is there without any driver.
"""
_REMEDY: Final = "nvidia-smi says the same; after an update of the driver reboot; in a container: docker run --gpus all"
_NVIDIA: Final = "0x10de"


async def check(host: Host) -> Finding:
    gpus = await read_gpus(host)
    version = await read(host, "/proc/driver/nvidia/version")
    lines = version.splitlines()[:1] if version else []
    evidence = tuple(Evidence("/proc/driver/nvidia/version", 1, line) for line in lines)
    if not gpus.error:
        names = sorted({f"{sum(other.name == gpu.name for other in gpus.gpus)} x {gpu.name}" for gpu in gpus.gpus})
        cuda = f", CUDA up to {gpus.cuda // 1000}.{gpus.cuda % 1000 // 10}" if gpus.cuda else ""
        return Finding(
            ID, Status.PASS, f"driver {gpus.driver}{cuda}: {', '.join(names) or 'no GPU'}", evidence=evidence
        )
    if "pynvml" in gpus.error:
        return Finding(ID, Status.SKIP, gpus.error, evidence=evidence, remedy="pip install nvidia-ml-py")
    if gpus.is_present:
        title = f"the driver is there, but NVML does not answer: {gpus.error}"
        return Finding(ID, Status.FAIL, title, root_cause=True, evidence=evidence, remedy=_REMEDY)
    classes = await host.files("/sys/bus/pci/devices/*/vendor")
    cards = [path for path, vendor in classes.items() if vendor.strip() == _NVIDIA]
    if cards and not (await torch_version(host)).endswith("+cpu"):
        title = f"{len(cards)} PCI devices of NVIDIA, but no driver"
        return Finding(
            ID, Status.FAIL, title, root_cause=True, evidence=(Evidence(cards[0], 1, _NVIDIA),), remedy=_REMEDY
        )
    return Finding(ID, Status.SKIP, gpus.error)
