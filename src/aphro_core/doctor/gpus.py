"""The GPUs of a host as the driver sees them, for every check that speaks of them."""

from __future__ import annotations

from typing import Final

import msgspec

from aphro_core.doctor.probe import probe
from aphro_core.errors import AphroError
from aphro_core.remote.remote import Host

NO_GPU: Final = "no NVIDIA GPU here"
_LIMIT_SECONDS: Final = 15.0


class GpuProcess(msgspec.Struct, frozen=True):
    pid: int
    bytes: int


class Fabric(msgspec.Struct, frozen=True):
    """NVSwitch registration: ``state`` 3 is completed (0: none, 2: in progress), ``status`` 0 success."""

    state: int
    status: int
    clique: int
    uuid: str


class Gpu(msgspec.Struct, frozen=True):
    """One GPU. ``ecc``: None where not counted; ``remapped``: corrected, uncorrected, pending, failed rows."""

    index: int
    name: str
    uuid: str
    bus_id: str
    capability: list[int]
    total_bytes: int
    used_bytes: int
    persistence: int | None
    throttling: list[str]
    is_power_capped: bool
    temperature: int | None
    ecc: dict[str, int | None]
    remapped: list[int] | None
    processes: list[GpuProcess]
    fabric: Fabric | None
    num_nvlinks: int


class GpuPair(msgspec.Struct, frozen=True):
    """``level``: PIX, PXB, PHB, NODE or SYS, as nvidia-smi has it; ``p2p``: read, write, nvlink -> allowed."""

    first: int
    second: int
    level: str
    num_nvlinks: int
    p2p: dict[str, bool]


class Gpus(msgspec.Struct, frozen=True):
    """``error``: why nothing is known; ``is_present``: there is a GPU or a driver, so the error is a fault. ``mps``:
    what shows that a process there shares them by MPS."""

    driver: str = ""
    cuda: int | None = None
    gpus: list[Gpu] = []
    pairs: list[GpuPair] = []
    mps: str | None = None
    error: str = ""
    is_present: bool = True


async def read_gpus(host: Host) -> Gpus:
    """Ask NVML in a process of its own. Raises TimeoutError when the driver hangs."""
    if not await has_gpu_files(host):
        return Gpus(error=NO_GPU, is_present=False)
    try:
        return msgspec.convert(await probe(host, "gpus", timeout_seconds=_LIMIT_SECONDS), Gpus)
    except AphroError as error:
        return Gpus(error=error.message)


async def has_gpu_files(host: Host) -> bool:
    """Whether a GPU or its driver shows at all: device files, the driver's folder in /proc, or WSL's device."""
    return bool(await host.links("/dev/nvidia[0-9]*", "/proc/driver/nvidia/version", "/dev/dxg"))


async def visible_devices(host: Host) -> list[str]:
    """``cuda:0`` ... of a host, as many as CUDA_VISIBLE_DEVICES leaves; [] without GPUs."""
    present = await host.links("/dev/nvidia[0-9]*")
    chosen = (await host.run("printenv", "CUDA_VISIBLE_DEVICES")).stdout.strip() if present else ""
    names = [name for name in chosen.split(",") if name.strip() not in ("", "-1")] if chosen else list(present)
    return [f"cuda:{number}" for number in range(len(names))]
