"""Whether network cards may reach GPU memory by themselves."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import NO_GPU, has_gpu_files
from aphro_core.doctor.rdma import NO_RDMA, read_devices
from aphro_core.doctor.versions import read_versions
from aphro_core.remote.remote import Host, read

ID: Final = "gdr.path"
TITLE: Final = "GPUDirect RDMA"
EXPLAIN: Final = """
Reads the driver's flavour (/proc/driver/nvidia/version), the kernel's version, /sys/module/nvidia_peermem and
/sys/kernel/mm/memory_peers. PASS when DMA-BUF is possible (open kernel modules and Linux 5.12 or newer) or when
nvidia_peermem is loaded; WARN when it is loaded where an NCCL up to 2.22.3 does not look; FAIL when there is neither:
every byte then goes through host memory. SKIP without GPUs or RDMA devices.
"""
_DMABUF_KERNEL: Final = (5, 12)
_FINDS_MODULE: Final = (2, 23, 4)  # NCCL from here on looks at the module itself
_REMEDY: Final = (
    "sudo modprobe nvidia_peermem; echo nvidia_peermem | sudo tee /etc/modules-load.d/nvidia_peermem.conf; "
    "or the open kernel modules for DMA-BUF"
)


async def check(host: Host) -> Finding:
    if not await has_gpu_files(host):
        return Finding(ID, Status.SKIP, NO_GPU)
    if not await read_devices(host):
        return Finding(ID, Status.SKIP, NO_RDMA)
    driver = await read(host, "/proc/driver/nvidia/version") or ""
    release = (await host.run("uname", "-r")).stdout.strip()
    module = await read(host, "/sys/module/nvidia_peermem/version")
    peers = list(await host.files("/sys/kernel/mm/memory_peers/*/version"))
    evidence = [Evidence("/proc/driver/nvidia/version", 1, driver.splitlines()[0])] if driver else []
    evidence += [Evidence("uname -r", 0, release)]
    evidence += [Evidence("/sys/module/nvidia_peermem/version", 1, module)] if module else []
    evidence += [Evidence(path, 1, "registered") for path in peers]
    has_dmabuf = "Open Kernel Module" in driver and _numbers(release)[:2] >= _DMABUF_KERNEL
    if not (has_dmabuf or peers or module):
        title = "neither nvidia_peermem nor DMA-BUF: RDMA goes through host memory"
        return Finding(ID, Status.FAIL, title, True, tuple(evidence), _REMEDY)
    nccl = (await read_versions(host)).get("NCCL", "")
    if not (has_dmabuf or peers) and nccl and _numbers(nccl) < _FINDS_MODULE:
        title = f"nvidia_peermem is loaded, but NCCL {nccl} does not look there"
        return Finding(ID, Status.WARN, title, True, tuple(evidence), "NCCL 2.23.4 or newer; or reload it after OFED")
    ways = ["DMA-BUF is possible"] if has_dmabuf else []
    ways += ["nvidia_peermem is loaded"] if module or peers else []
    return Finding(ID, Status.PASS, " and ".join(ways), evidence=tuple(evidence))


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.replace("-", ".").split(".")[:3]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)
