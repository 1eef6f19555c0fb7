"""What the engine and the process that speaks to Ray tell each other: one JSON object a line."""

from __future__ import annotations

from typing import Literal

import msgspec

from aphro_core.checkpoint.digests import DigestProgress
from aphro_core.worker.host_report import HostReport

Resource = Literal["GPU", "aphro_slot", "CPU"]  # of Ray; a rank takes one of it


class Offer(msgspec.Struct, frozen=True):
    """What one agent could take: a node's resources, or those of one bundle of a placement group (-1: of none)."""

    total: dict[Resource, int]
    free: dict[Resource, int]
    bundle: int = -1


class RayNode(msgspec.Struct, frozen=True):
    """A live node. ``reachable``: its raylet took a connection just now; Ray itself notices a dead host much later."""

    id: str
    hostname: str
    address: str
    reachable: bool
    offers: list[Offer]

    def total(self, resource: Resource) -> int:
        return sum(offer.total.get(resource, 0) for offer in self.offers)

    def free(self, resource: Resource) -> int:
        return sum(offer.free.get(resource, 0) for offer in self.offers)


class AgentReport(msgspec.Struct, frozen=True):
    """A node as the agent on it sees it. ``environment``: what was set for this node; it wins over what travels.

    ``log_dir``: where its cluster looks for what ranks print; "" in a cluster that is not aphro's.
    """

    host: HostReport
    environment: dict[str, str] = {}
    log_dir: str = ""


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """First line. ``node_address`` picks this host's raylet where it has several; ``placement_group`` is an id, hex."""

    address: str
    node_address: str = ""
    placement_group: str = ""


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Asks for a Cluster."""


class AgentPlace(msgspec.Struct, frozen=True):
    node: str
    bundle: int
    resource: Resource
    num_ranks: int


class OpenAgents(msgspec.Struct, frozen=True, tag="open_agents"):
    """Asks for Agents: one for each place, known from then on by its index in ``places``."""

    places: list[AgentPlace]
    model_path: str
    timeout_seconds: float


class DigestFiles(msgspec.Struct, frozen=True, tag="digest_files"):
    """Asks an agent for the digests of the model's files: FilesDigested, several times."""

    agent: int
    model_path: str


class RankStart(msgspec.Struct, frozen=True):
    """``secret``, hex, is known to the engine and to this agent alone: who proves it is this rank, once."""

    rank: int
    agent: int
    address: str
    port: int
    secret: str


class StartRanks(msgspec.Struct, frozen=True, tag="start_ranks"):
    """No answer: a rank connects to the engine, or a RankEnded says why it did not."""

    ranks: list[RankStart]


class KillRank(msgspec.Struct, frozen=True, tag="kill_rank"):
    rank: int


ToDriver = Connect | Look | OpenAgents | DigestFiles | StartRanks | KillRank


class Cluster(msgspec.Struct, frozen=True, tag="cluster"):
    """The nodes as of now, this host's own first. ``address`` is this host's, by which the others reach it."""

    address: str
    nodes: list[RayNode]


class Agents(msgspec.Struct, frozen=True, tag="agents"):
    """A report or the reason why there is none, for each place."""

    reports: list[AgentReport | None]
    failures: list[str]


class FilesDigested(msgspec.Struct, frozen=True, tag="files_digested"):
    """How far an agent is; the last has the digests, or says in ``problem`` why there are none."""

    agent: int
    progress: DigestProgress
    problem: str = ""


class RankEnded(msgspec.Struct, frozen=True, tag="rank_ended"):
    """``exit_code`` is negative after a signal, None when the rank was lost with its node. ``words``: its last ones."""

    rank: int
    exit_code: int | None
    words: str
    was_short: bool = False  # the kernel of that host has killed something for want of memory meanwhile


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Nothing more comes."""

    message: str
    hint: str


FromDriver = Cluster | Agents | FilesDigested | RankEnded | Refused
