"""Trees of sysfs and /proc as hosts with RDMA have them: InfiniBand, RoCE, both, and what goes wrong with them."""

from __future__ import annotations

ZERO = "0000:0000:0000:0000:0000:0000:0000:0000"


def ib_port(
    device: str,
    number: int = 1,
    *,
    state: str = "4: ACTIVE",
    phys: str = "5: LinkUp",
    rate: str = "400 Gb/sec (4X NDR)",
    lid: str = "0x2a",
    sm_lid: str = "0x1",
) -> dict[str, str]:
    """An InfiniBand port of a host channel adapter."""
    base = f"/sys/class/infiniband/{device}"
    port = f"{base}/ports/{number}"
    return {
        f"{base}/node_type": "1: CA\n",
        f"{base}/fw_ver": "28.39.2048\n",
        f"{base}/board_id": "MT_0000000838\n",
        f"{port}/state": f"{state}\n",
        f"{port}/phys_state": f"{phys}\n",
        f"{port}/rate": f"{rate}\n",
        f"{port}/link_layer": "InfiniBand\n",
        f"{port}/lid": f"{lid}\n",
        f"{port}/sm_lid": f"{sm_lid}\n",
        f"{port}/gids/0": "fe80:0000:0000:0000:a088:c203:0068:57a0\n",
        f"{port}/gid_attrs/types/0": "IB/RoCE v1\n",
        f"{port}/counters/symbol_error": "0\n",
        f"{port}/counters/link_downed": "0\n",
        f"{port}/counters/port_rcv_data": "123456\n",
    }


def roce_port(device: str, interface: str, ipv4: str | None, *, mtu: int = 9000, **values: str) -> dict[str, str]:
    """A RoCE port as mlx5 has it: link-local v1 and v2, then the address v1 and v2, then empty entries."""
    files = ib_port(device, **{"rate": "100 Gb/sec (4X EDR)", "lid": "0x0", "sm_lid": "0x0", **values})
    port = f"/sys/class/infiniband/{device}/ports/1"
    files |= {f"{port}/link_layer": "Ethernet\n", f"/sys/class/net/{interface}/mtu": f"{mtu}\n"}
    gids = ["fe80:0000:0000:0000:0e42:a1ff:fe73:5b58"] * 2
    if ipv4:
        a, b, c, d = (int(part) for part in ipv4.split("."))
        gids += [f"0000:0000:0000:0000:0000:ffff:{a:02x}{b:02x}:{c:02x}{d:02x}"] * 2
    for index, gid in enumerate([*gids, ZERO, ZERO]):
        files[f"{port}/gids/{index}"] = f"{gid}\n"
        if gid != ZERO:  # the attributes of an empty entry cannot be read
            files[f"{port}/gid_attrs/types/{index}"] = ("RoCE v2\n", "IB/RoCE v1\n")[index % 2 == 0]
            files[f"{port}/gid_attrs/ndevs/{index}"] = f"{interface}\n"
    return files


def dgx(num_cards: int = 4) -> dict[str, str]:
    """GPUs and cards behind one PCIe switch each, two a socket."""
    files: dict[str, str] = {}
    for number in range(num_cards):
        root, bus, node = f"pci0000:{number}0", f"{number}1", number // 2
        switch = f"/sys/devices/{root}/0000:{number}0:01.0/0000:{bus}:00.0"
        files |= pci_device(f"{switch}/0000:{bus}:10.0/0000:{number}2:00.0", "0x10de", "0x030200", node)
        files |= pci_device(f"{switch}/0000:{bus}:11.0/0000:{number}3:00.0", "0x15b3", "0x020700", node)
        files |= ib_port(f"mlx5_{number}")
        files[f"/sys/class/infiniband/mlx5_{number}/device"] = (
            f"-> ../../../../sys/devices/{root}/0000:{number}0:01.0/0000:{bus}:00.0/0000:{bus}:11.0/0000:{number}3:00.0"
        )
    return files


def pci_device(path: str, vendor: str, kind: str, node: int) -> dict[str, str]:
    """A device below its bridges, and the link to it that the kernel keeps below /sys/bus."""
    bdf = path.rsplit("/", 1)[1]
    return {
        f"{path}/vendor": f"{vendor}\n",
        f"{path}/class": f"{kind}\n",
        f"{path}/device": "0x1021\n",
        f"{path}/numa_node": f"{node}\n",
        f"/sys/bus/pci/devices/{bdf}": f"-> ../../../..{path}",
    }
