"""The RDMA devices of a host as the kernel shows them below /sys/class/infiniband: ports, states, GID tables."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from aphro_core.doctor.environment import Variable, read_variables
from aphro_core.doctor.finding import Evidence
from aphro_core.doctor.hca_filter import selects
from aphro_core.remote.remote import Host

NO_RDMA: Final = "no RDMA device here"
_BASE: Final = "/sys/class/infiniband"
_ACTIVE: Final = 4


@dataclass(frozen=True)
class Gid:
    """An entry of a port's table that is in use. ``version``: 1 or 2 of RoCE (on InfiniBand 1); 0 if not said."""

    index: int
    address: ipaddress.IPv6Address
    version: Literal[0, 1, 2]
    interface: str

    @property
    def ipv4(self) -> str:
        """The IPv4 address that it maps, "" if none."""
        return str(self.address.ipv4_mapped or "")


@dataclass(frozen=True)
class Port:
    """One port. ``state`` and ``phys_state`` as the kernel writes them (``4: ACTIVE``); ``rate`` likewise."""

    device: str
    number: int
    state: str
    phys_state: str
    rate: str
    link_layer: str
    lid: int
    sm_lid: int
    gids: tuple[Gid, ...]

    @property
    def label(self) -> str:
        return f"{self.device}:{self.number}"

    @property
    def is_active(self) -> bool:
        return self.state.startswith(f"{_ACTIVE}:")

    @property
    def is_ethernet(self) -> bool:
        return self.link_layer == "Ethernet"

    @property
    def gbits(self) -> float:
        found = re.match(r"([\d.]+)", self.rate)
        return float(found[1]) if found else 0.0

    def evidence(self, name: str) -> Evidence:
        """The file behind one of its values: state, phys_state, rate, link_layer, lid, sm_lid."""
        return Evidence(f"{_BASE}/{self.device}/ports/{self.number}/{name}", 1, str(getattr(self, name)))

    @property
    def roce_gid(self) -> Gid | None:
        """What NCCL 2.21 and newer choose: RoCE v2 with an IPv4 address; else v2 with a global IPv6 one."""
        second = [gid for gid in self.gids if gid.version == 2]
        mapped = [gid for gid in second if gid.ipv4]
        return next(iter([*mapped, *(gid for gid in second if not gid.address.is_link_local)]), None)


@dataclass(frozen=True)
class RdmaDevice:
    name: str
    node_type: str
    firmware: str
    board: str
    ports: tuple[Port, ...]


async def read_devices(host: Host) -> list[RdmaDevice]:
    """All of them, in the order of their names; [] without any."""
    files = await host.files(
        f"{_BASE}/*/node_type",
        f"{_BASE}/*/fw_ver",
        f"{_BASE}/*/board_id",
        f"{_BASE}/*/ports/*/[lprs]*",  # link_layer, lid, phys_state, rate, state, sm_lid
        f"{_BASE}/*/ports/*/gids/*",
        f"{_BASE}/*/ports/*/gid_attrs/*/*",
    )
    texts = {path.removeprefix(f"{_BASE}/"): text.strip() for path, text in files.items()}
    names = sorted({path.split("/")[0] for path in texts}, key=natural)
    return [_device(name, texts) for name in names]


async def read_selected(host: Host) -> tuple[list[Port], Variable | None]:
    """The ACTIVE ports that NCCL would use, and the NCCL_IB_HCA that decided, None if it is not set."""
    variable = (await read_variables(host, "NCCL_IB_HCA")).get("NCCL_IB_HCA")
    ports = [port for device in await read_devices(host) for port in device.ports if port.is_active]
    if variable is None:
        return ports, None
    return [port for port in ports if selects(variable.value, port.device, port.number)], variable


def natural(name: str) -> tuple[str, int]:
    """Sorts mlx5_2 before mlx5_10."""
    found = re.match(r"(.*?)(\d*)$", name)
    assert found is not None
    return found[1], int(found[2] or 0)


def _device(name: str, texts: Mapping[str, str]) -> RdmaDevice:
    numbers = sorted({int(found[1]) for path in texts if (found := re.match(rf"{re.escape(name)}/ports/(\d+)/", path))})
    return RdmaDevice(
        name,
        texts.get(f"{name}/node_type", ""),
        texts.get(f"{name}/fw_ver", ""),
        texts.get(f"{name}/board_id", ""),
        tuple(_port(name, number, texts) for number in numbers),
    )


def _port(device: str, number: int, texts: Mapping[str, str]) -> Port:
    base = f"{device}/ports/{number}"
    text = {name: texts.get(f"{base}/{name}", "") for name in ("state", "phys_state", "rate", "link_layer")}
    lid, sm_lid = (_number(texts.get(f"{base}/{name}", "")) for name in ("lid", "sm_lid"))
    names = [path.rsplit("/", 1)[1] for path in texts if path.startswith(f"{base}/gids/")]
    indices = sorted(int(name) for name in names if name.isdecimal())
    gids = [gid for index in indices if (gid := _gid(base, index, texts)) is not None]
    return Port(device, number, **text, lid=lid, sm_lid=sm_lid, gids=tuple(gids))


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return 0


def _gid(base: str, index: int, texts: Mapping[str, str]) -> Gid | None:
    """None for an empty index: all zero, whose attributes cannot even be read."""
    try:
        address = ipaddress.IPv6Address(texts[f"{base}/gids/{index}"])
    except ValueError:
        return None
    if not int(address):
        return None
    kind = texts.get(f"{base}/gid_attrs/types/{index}", "")
    version: Literal[0, 1, 2] = 2 if "v2" in kind else 1 if "RoCE" in kind else 0
    return Gid(index, address, version, texts.get(f"{base}/gid_attrs/ndevs/{index}", ""))
