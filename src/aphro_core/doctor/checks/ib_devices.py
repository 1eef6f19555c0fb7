"""Which RDMA devices the kernel has, and whether a card is there without its driver."""

from __future__ import annotations

from typing import Final

from aphro_core.doctor.finding import Evidence, Finding, Status
from aphro_core.doctor.rdma import NO_RDMA, read_devices
from aphro_core.remote.remote import Host

ID: Final = "ib.devices"
TITLE: Final = "RDMA devices"
EXPLAIN: Final = """
Lists /sys/class/infiniband with node type and firmware, and PCI devices of vendors that make RDMA cards. PASS with one
or more; WARN when cards of one board have different firmware; FAIL when such a card is there but no RDMA device: its
driver is not loaded; SKIP when there is neither.
"""
_DRIVERS: Final = {"0x15b3": "mlx5_ib", "0x1d0f": "efa", "0x14e4": "bnxt_re"}
_RDMA_CLASSES: Final = ("0x0207", "0x0200")  # InfiniBand and Ethernet controllers
_EFA: Final = ("0xefa0", "0xefa1", "0xefa2", "0xefa3")


async def check(host: Host) -> Finding:
    devices = await read_devices(host)
    evidence = tuple(
        Evidence(f"/sys/class/infiniband/{device.name}/fw_ver", 1, f"{device.name}: firmware {device.firmware or '?'}")
        for device in devices
    )
    if devices:
        firmware: dict[str, set[str]] = {}
        for device in devices:
            firmware.setdefault(device.board, set()).add(device.firmware)
        mixed = next((board for board, versions in firmware.items() if board and len(versions) > 1), None)
        title = f"{len(devices)} RDMA devices: {', '.join(device.name for device in devices)}"
        if mixed:
            title += f"; cards of board {mixed} have firmware {' and '.join(sorted(firmware[mixed]))}"
            return Finding(ID, Status.WARN, title, False, evidence, "bring all cards to one firmware: mlxfwmanager")
        return Finding(ID, Status.PASS, title, evidence=evidence)
    cards = await _cards(host)
    if not cards:
        return Finding(ID, Status.SKIP, NO_RDMA)
    path, driver = next(iter(cards.items()))
    title = f"{len(cards)} cards that can do RDMA, but no RDMA device: the driver {driver} is not loaded"
    found = (Evidence(path, 1, driver),)
    return Finding(ID, Status.FAIL, title, True, found, f"sudo modprobe {driver}; in a container: on its host")


async def _cards(host: Host) -> dict[str, str]:
    """Path of the vendor file -> driver, of InfiniBand cards and of Mellanox, Broadcom and EFA Ethernet ones."""
    base = "/sys/bus/pci/devices/*"
    vendors, classes = await host.files(f"{base}/vendor"), await host.files(f"{base}/class")
    products = await host.files(f"{base}/device")
    found = {}
    for path, vendor in vendors.items():
        driver = _DRIVERS.get(vendor.strip())
        kind = classes.get(path.replace("/vendor", "/class"), "")[:6]
        product = products.get(path.replace("/vendor", "/device"), "").strip()
        is_card = (
            product in _EFA if driver == "efa" else kind == "0x0207" or (driver == "mlx5_ib" and kind in _RDMA_CLASSES)
        )
        if driver and is_card:
            found[path] = driver
    return found
