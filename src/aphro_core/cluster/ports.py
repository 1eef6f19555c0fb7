"""Every port of a cluster, counted from the head's one: a fixed range, so that one firewall line is enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

DEFAULT_PORT: Final = 22420  # below the kernel's range for outgoing connections, and unlike Ray's 6379 not Redis's
NUM_PORTS: Final = 120
_WORKERS: Final = 20  # offset of the first of those
MAX_FIRST_PORT: Final = 65536 - NUM_PORTS

Holder = Literal["head", "every node"]


@dataclass(frozen=True, slots=True)
class Port:
    """``first`` to ``last`` of TCP. ``binds``: where it listens; Ray binds some of its ports to all addresses."""

    first: int
    last: int
    holder: Holder
    purpose: str
    binds: Literal["node address", "all addresses", "127.0.0.1"]

    @property
    def numbers(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The ports of a cluster whose head listens at ``head``."""

    head: int

    @property
    def control(self) -> int:
        return self.head + 1

    @property
    def node_manager(self) -> int:
        return self.head + 2

    @property
    def object_manager(self) -> int:
        return self.head + 3

    @property
    def runtime_env(self) -> int:
        return self.head + 4

    @property
    def agent_grpc(self) -> int:
        return self.head + 5

    @property
    def agent_http(self) -> int:
        return self.head + 6

    @property
    def metrics(self) -> int:
        return self.head + 7

    @property
    def dashboard(self) -> int:
        return self.head + 8

    @property
    def client(self) -> int:
        return self.head + 9

    @property
    def dashboard_metrics(self) -> int:
        return self.head + 10

    @property
    def workers(self) -> tuple[int, int]:
        return self.head + _WORKERS, self.head + NUM_PORTS - 1

    def ports(self) -> list[Port]:
        """All of them, those of Ray that stay closed without its dashboard too."""
        return [
            Port(self.head, self.head, "head", "Ray: the list of nodes (GCS)", "all addresses"),
            Port(self.control, self.control, "every node", "aphro: joining, heartbeats, logs", "node address"),
            Port(self.node_manager, self.node_manager, "every node", "Ray: node manager", "all addresses"),
            Port(self.object_manager, self.object_manager, "every node", "Ray: object manager", "all addresses"),
            Port(self.runtime_env, self.runtime_env, "every node", "Ray: runtime environments", "node address"),
            Port(self.agent_grpc, self.metrics, "every node", "Ray: agent and metrics", "all addresses"),
            Port(self.dashboard, self.dashboard, "head", "Ray: dashboard, with --dashboard", "127.0.0.1"),
            Port(self.client, self.client, "head", "Ray: client, where grpcio is installed", "node address"),
            Port(self.dashboard_metrics, self.dashboard_metrics, "head", "Ray: dashboard's metrics", "all addresses"),
            Port(*self.workers, "every node", "Ray: workers", "all addresses"),
        ]
