"""Which variables of the environment travel to workers on other hosts, and which hold secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from aphro_core.errors import UsageError

_TRAVELS: Final = ("NCCL_", "GLOO_", "UCX_", "HF_", "OMP_", "TORCH_", "CUDA_", "APHRO_")
# those of one host (its devices, its address), and those that workers have no business with
_STAYS: Final = (
    "APHRO_API_KEY",
    "APHRO_CLUSTER_NODE",
    "APHRO_CLUSTER_TOKEN",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
)
# what names a card or its address: a value that is set on a host is meant for that host
_HOST_SPECIFIC: Final = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "UCX_NET_DEVICES")
_SECRET: Final = {"TOKEN", "KEY", "KEYS", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS"}
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """By rule: the settings of collectives and libraries travel; each host keeps its devices, addresses and caches."""
    return {
        name: value for name, value in environment.items() if name.startswith(_TRAVELS) and not name.startswith(_STAYS)
    }


def host_specific(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that are set here and name what only this host has."""
    return {name: environment[name] for name in _HOST_SPECIFIC if name in environment}


def is_secret(name: str) -> bool:
    """Whether a variable's value must not be shown: by the words of its name."""
    return not _SECRET.isdisjoint(name.upper().split("_"))


def parse_assignments(words: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    """``-e NAME=VALUE`` as typed; ``-e NAME`` takes the value of this shell, so that no argument list shows it."""
    found = {}
    for word in words:
        name, is_assigned, value = word.partition("=")
        if not _NAME.fullmatch(name):
            raise UsageError(f"-e {word!r} is no NAME=VALUE", hint="-e NCCL_SOCKET_IFNAME=eth0, or -e HF_TOKEN")
        if not is_assigned and name not in environment:
            raise UsageError(f"-e {name}: this shell has no such variable", hint=f"-e {name}=VALUE, or export {name}")
        found[name] = value if is_assigned else environment[name]
    return found
