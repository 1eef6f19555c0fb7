"""Whether each GPU has a network card near it."""

from __future__ import annotations

from collections import Counter
from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.gpus import NO_GPU
from aphro_core.doctor.pci import distance, read_accelerators
from aphro_core.doctor.rdma import NO_RDMA, read_selected
from aphro_core.remote.remote import Host

ID: Final = "gdr.distance"
TITLE: Final = "GPUs and their network cards"
EXPLAIN: Final = """
Follows the PCIe tree from each GPU to its nearest RDMA device that NCCL would use. PASS when every GPU has one behind
the same switches (PIX, PXB), as GPUDirect RDMA needs by default; WARN when it is only at the host bridge, in the node
or across sockets (PHB, NODE, SYS): NCCL then goes through host memory. SKIP without GPUs or RDMA devices.
"""
_ORDER: Final = ("PIX", "PXB", "PHB", "NODE", "SYS")


async def check(host: Host) -> Finding:
    devices = await read_accelerators(host)
    selected = {port.device for port in (await read_selected(host))[0]}
    gpus = [device for device in devices if device.kind == "gpu"]
    cards = [device for device in devices if device.kind == "rdma" and device.label in selected]
    if not gpus or not cards:
        return Finding(ID, Status.SKIP, NO_GPU if not gpus else NO_RDMA)
    evidence, far, uses = [], [], Counter[str]()
    for gpu in gpus:
        near = min(cards, key=lambda card: (_ORDER.index(distance(gpu, card)), uses[card.label]))
        uses[near.label] += 1
        level = distance(gpu, near)
        evidence.append(Evidence("/sys/bus/pci/devices", 0, f"{gpu.label} - {near.label}: {level}"))
        far += [f"{gpu.label} ({level})"] if level not in ("PIX", "PXB") else []
    if far:
        title = f"no RDMA device behind the switches of {', '.join(far)}"
        remedy = (
            "one card a PCIe switch; virtual machine: the provider's NCCL_TOPO_FILE; NCCL_NET_GDR_LEVEL=PHB or SYS "
            "only after measuring"
        )
        return Finding(ID, Status.WARN, title, False, tuple(evidence), remedy)
    return Finding(ID, Status.PASS, f"each of {len(gpus)} GPUs has a card near it", evidence=tuple(evidence))
