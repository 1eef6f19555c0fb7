"""The contract of a check: one small file each in checks/, and a row in doctor.py's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aphro_core.doctor.finding import Finding
from aphro_core.remote.remote import Host


class HostCheck(Protocol):
    """A file that looks at one host. ``EXPLAIN`` is what `aphro doctor explain ID` prints."""

    @property
    def ID(self) -> str: ...  # noqa: N802
    @property
    def TITLE(self) -> str: ...  # noqa: N802
    @property
    def EXPLAIN(self) -> str: ...  # noqa: N802
    async def check(self, host: Host) -> Finding | list[Finding]: ...


@dataclass(frozen=True)
class LiveOptions:
    """What the live check shall assume.

    ``model``: whose sizes to measure; None takes ``hidden_size`` and ``num_layers``. ``tp``: ranks of a tensor-parallel
    group; None takes all. ``pp``: stages that a start shall have, for counting devices. ``device``: auto, cpu or cuda.
    ``env``: variables for every rank, without secrets. ``limit_seconds``: how long a collective may take before its
    ranks count as hanging.
    """

    model: str | None = None
    tp: int | None = None
    pp: int | None = None
    device: str = "auto"
    env: Mapping[str, str] = field(default_factory=dict)
    limit_seconds: float = 10.0
    start_seconds: float = 60.0


@dataclass(frozen=True)
class Cluster:
    """What a check over all hosts is given. ``progress`` says in a line what is being done."""

    hosts: Sequence[Host]
    live: LiveOptions
    ib: bool = False
    progress: Callable[[str], None] = lambda line: None


class ClusterCheck(Protocol):
    """A file that compares hosts, or lets them talk to each other."""

    @property
    def ID(self) -> str: ...  # noqa: N802
    @property
    def TITLE(self) -> str: ...  # noqa: N802
    @property
    def EXPLAIN(self) -> str: ...  # noqa: N802
    async def check(self, cluster: Cluster) -> Finding | list[Finding]: ...
