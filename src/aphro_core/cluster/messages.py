"""What members of a cluster, and the commands of an operator, say to each other: one request, its answer or answers."""

from __future__ import annotations

import msgspec

from aphro_core.cluster.membership import Resource, Role


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says of itself when it joins. ``devices``: ranks that it takes, each one ``resource`` of Ray's."""

    id: str
    name: str
    role: Role
    address: str
    interface: str
    devices: int
    resource: Resource
    device_names: list[str]
    versions: dict[str, str]
    started_at: float


class Memory(msgspec.Struct, frozen=True):
    """Bytes of the host that new work can take, and of each GPU: free and in all."""

    free_bytes: int
    gpu_free_bytes: list[int]
    gpu_total_bytes: list[int]


class Model(msgspec.Struct, frozen=True):
    """A model that is served: by whom, and which node (by address) holds each rank."""

    name: str
    url: str
    driver: str
    ranks: dict[int, str]


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One node as the head knows it. ``age_seconds``: since it was heard. ``memory``: None where it did not answer."""

    node: Node
    state: str
    age_seconds: float
    memory: Memory | None


class Departed(msgspec.Struct, frozen=True):
    name: str
    address: str
    reason: str
    age_seconds: float


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """May I join, and what must I know? Of the head alone."""

    node: Node


class Reach(msgspec.Struct, frozen=True, tag="reach"):
    """Connect to me: the head opens a connection to that address and proves that it is me."""

    address: str
    port: int


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    node: Node


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    id: str
    reason: str


class AskStatus(msgspec.Struct, frozen=True, tag="ask-status"):
    """Of the head alone: all nodes, each asked for its memory now."""


class AskMemory(msgspec.Struct, frozen=True, tag="ask-memory"):
    pass


class AskEnvironment(msgspec.Struct, frozen=True, tag="ask-environment"):
    pass


class AskPorts(msgspec.Struct, frozen=True, tag="ask-ports"):
    pass


class AskLog(msgspec.Struct, frozen=True, tag="ask-log"):
    """The last ``num_lines`` of a rank's log, or of the member's (None); with ``follow`` also what comes after."""

    rank: int | None
    num_lines: int
    follow: bool = False


class Announce(msgspec.Struct, frozen=True, tag="announce"):
    """A model is served as long as this connection lasts. Of the head alone."""

    model: Model


class Down(msgspec.Struct, frozen=True, tag="down"):
    """End this node; where it is the head, all nodes."""

    reason: str


Request = Hello | Reach | Beat | Leaving | AskStatus | AskMemory | AskEnvironment | AskPorts | AskLog | Announce | Down


class Greeting(msgspec.Struct, frozen=True, tag="greeting"):
    """The head lets a host in. ``environment``: what was typed with ``up -e``."""

    head: Node
    environment: dict[str, str]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """``problems``: what did not work of it, by node."""

    problems: dict[str, str] = {}


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    message: str
    hint: str = ""


class Status(msgspec.Struct, frozen=True, tag="status"):
    rows: list[NodeRow]
    departed: list[Departed]
    models: list[Model]


class MemoryNow(msgspec.Struct, frozen=True, tag="memory"):
    """``id``: of the node that answers, whatever was there before at its address."""

    id: str
    memory: Memory


class Variable(msgspec.Struct, frozen=True):
    """``text``: its value, or that of a secret masked. ``source``: "-e" (typed for all or this node) or "shell"."""

    text: str
    source: str


class Environment(msgspec.Struct, frozen=True, tag="environment"):
    variables: dict[str, Variable]


class Listening(msgspec.Struct, frozen=True):
    port: int
    address: str
    pid: int
    name: str


class Ports(msgspec.Struct, frozen=True, tag="ports"):
    """What the processes of this node's member listen on now."""

    listening: list[Listening]


class LogLines(msgspec.Struct, frozen=True, tag="log"):
    lines: list[str]
    is_last: bool


Answer = Greeting | Done | Refused | Status | MemoryNow | Environment | Ports | LogLines
