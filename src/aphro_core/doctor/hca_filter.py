"""NCCL's rule for RDMA devices: which ports NCCL_IB_HCA takes. Pure."""

from __future__ import annotations

from typing import Final

MAX_DEVICES: Final = 32  # what NCCL holds at most


def selects(pattern: str, device: str, port: int) -> bool:
    """Whether NCCL_IB_HCA=``pattern`` takes a port: prefixes unless ``=``, ``^`` all but these, ``:PORT`` optional."""
    is_excluding = pattern.startswith("^")
    rest = pattern.lstrip("^")
    is_exact = rest.startswith("=")
    words = [word.strip() for word in rest.lstrip("=").split(",") if word.strip()]
    if not words:
        return True
    return any(_matches(word, device, port, is_exact) for word in words) != is_excluding


def surprises(pattern: str, devices: list[str]) -> list[str]:
    """Devices that a prefix takes although a longer name was hardly meant: ``mlx5_1`` takes ``mlx5_10``."""
    if pattern.lstrip("^").startswith("="):
        return []
    words = [word.split(":")[0].strip() for word in pattern.lstrip("^").split(",") if word.strip()]
    return [
        name
        for name in devices
        if name not in words and any(word in devices and name.startswith(word) for word in words)
    ]


def _matches(word: str, device: str, port: int, is_exact: bool) -> bool:
    name, _, rest = word.partition(":")
    wanted = rest.partition(":")[0]  # newer ones add rail and plane behind the port
    if wanted.isdigit() and int(wanted) != port:
        return False
    return device == name if is_exact else device.startswith(name)
