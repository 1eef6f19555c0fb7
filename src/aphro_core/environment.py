"""Which variables of the environment travel to workers on other hosts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

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


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """By rule: the settings of collectives and libraries travel; each host keeps its devices, addresses and caches."""
    return {
        name: value for name, value in environment.items() if name.startswith(_TRAVELS) and not name.startswith(_STAYS)
    }


def host_specific(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that are set here and name what only this host has."""
    return {name: environment[name] for name in _HOST_SPECIFIC if name in environment}
