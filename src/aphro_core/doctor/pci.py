"""The PCIe tree of a host: its GPUs and RDMA devices, the bridges above each, and how far apart two of them are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from aphro_core.remote.remote import Host, read

Distance = Literal["PIX", "PXB", "PHB", "NODE", "SYS"]
_BDF: Final = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_NVIDIA: Final = "0x10de"
_DISPLAY: Final = ("0x0300", "0x0302")  # VGA and 3D controllers


@dataclass(frozen=True)
class Device:
    """``bridges``: those above it, from the root down. ``root``: its host bridge. ``numa_node`` -1: unknown."""

    bdf: str
    label: str
    kind: Literal["gpu", "rdma"]
    root: str
    bridges: tuple[str, ...]
    numa_node: int


async def read_accelerators(host: Host) -> list[Device]:
    """GPUs of NVIDIA, then RDMA devices; what has no PCI device (a virtual RDMA device) is left out."""
    base = "/sys/bus/pci/devices"
    vendors = await host.files(f"{base}/*/vendor")
    classes = await host.files(f"{base}/*/class")
    gpus = [
        path.rsplit("/", 2)[1]
        for path, vendor in vendors.items()
        if vendor.strip() == _NVIDIA and classes.get(path.replace("/vendor", "/class"), "")[:6] in _DISPLAY
    ]
    paths = await host.links(*(f"{base}/{bdf}" for bdf in gpus)) if gpus else {}
    devices = [await _describe(host, real, f"GPU {bdf}", "gpu") for bdf, real in zip(gpus, paths.values(), strict=True)]
    rdma = await host.links("/sys/class/infiniband/*/device")
    devices += [await _describe(host, real, path.split("/")[4], "rdma") for path, real in rdma.items()]
    return [device for device in devices if device is not None]


async def is_virtual(host: Host) -> bool:
    """Whether the processor says that it runs under a hypervisor."""
    return bool(re.search(r"^flags\s*:.*\bhypervisor\b", await read(host, "/proc/cpuinfo") or "", re.MULTILINE))


def distance(first: Device, second: Device) -> Distance:
    """As `nvidia-smi topo -m` has it: one switch, several, the host bridge, bridges of one node, or across nodes."""
    if first.root != second.root:
        same_node = first.numa_node == second.numa_node and first.numa_node >= 0
        return "NODE" if same_node else "SYS"
    common = sum(1 for a, b in zip(first.bridges, second.bridges, strict=False) if a == b)
    if not common:
        return "PHB"
    # below the last common bridge: at most its own two ports, else further switches
    below = max(len(first.bridges), len(second.bridges)) - common
    return "PIX" if below <= 1 else "PXB"


async def _describe(host: Host, real: str, label: str, kind: Literal["gpu", "rdma"]) -> Device | None:
    chain = _BDF.findall(real)
    if not chain:
        return None
    root = real.split("/")[3] if real.startswith("/sys/devices/") else ""
    node = await read(host, f"{real}/numa_node")
    number = int(node) if node and node.lstrip("-").isdigit() else -1
    return Device(chain[-1], label, kind, root, tuple(chain[:-1]), number)
