"""What a command hands to the member process that it starts, and what that says until the node is in."""

from __future__ import annotations

import msgspec

from aphro_core.cluster.membership import Resource, Role


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Over standard input: it holds the token and what was typed with ``-e``.

    ``head`` and ``head_port``: where Ray's list of nodes is; of a head, itself. ``wait_seconds``: for it to be up.
    """

    role: Role
    head: str
    head_port: int
    address: str
    interface: str
    token: str
    devices: int
    resource: Resource
    device_names: list[str]
    environment: dict[str, str]
    dashboard: bool = False
    allow_skew: bool = False
    wait_seconds: float = 0.0


class Said(msgspec.Struct, frozen=True, tag="said"):
    text: str
    is_warning: bool = False


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    seconds: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    message: str
    hint: str
    exit_code: int


Progress = Said | Ready | Failed
