"""What the driver of the live check and its ranks say to each other: one JSON object a line."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["all_reduce", "hand_over", "graph_all_reduce"]


class Work(msgspec.Struct, frozen=True):
    """A collective of so many bytes a rank, repeated for about ``seconds``.

    It is left out where one alone would take longer than ``max_seconds``, as smaller ones before it tell.
    """

    kind: Kind
    num_bytes: int
    seconds: float = 0.2
    max_repeats: int = 50
    max_seconds: float = 2.0


class Timing(msgspec.Struct, frozen=True):
    """What a work took: seconds of one collective; ``is_right``: every element was the sum.

    ``repeats`` 0: it was left out, and ``seconds`` is what it would have taken.
    """

    kind: Kind
    num_bytes: int
    seconds: float
    repeats: int
    is_right: bool


class StartRank(msgspec.Struct, frozen=True, tag="start"):
    """The first message. ``interface`` is for Gloo's and NCCL's sockets where the environment names none.

    ``store_address``: this rank keeps the store in which groups meet, bound to that address alone.
    """

    device: str  # cpu, or cuda:0
    limit_seconds: float
    interface: str | None
    store_address: str | None


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Join a new group as its ``rank`` and do the works. ``peers``: the addresses of its members' hosts."""

    group: str
    rank: int
    size: int
    store_address: str
    store_port: int
    works: list[Work]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Answered by a thread of its own, whatever the rank is doing."""


class SendLog(msgspec.Struct, frozen=True, tag="log"):
    """Answered like Ping: a rank that hangs can still tell what NCCL wrote."""


ToRank = StartRank | Measure | Ping | SendLog


class Started(msgspec.Struct, frozen=True, tag="started"):
    """``store_port`` 0: this rank keeps no store. ``nccl``: version of the library in use, None on CPUs."""

    store_port: int
    torch: str
    nccl: str | None
    device_name: str
    socket_interface: str  # what Gloo and NCCL will use, "" if they choose


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    timings: list[Timing]


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """``during`` says what was being done, in words that follow "while"."""

    during: str
    message: str


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    during: str


class RankLog(msgspec.Struct, frozen=True, tag="log"):
    """The rank's NCCL log so far, its end if it is long."""

    text: str


FromRank = Started | Measured | RankFailed | Pong | RankLog
