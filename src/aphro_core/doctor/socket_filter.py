"""NCCL's rule for the interfaces of its sockets: which a filter takes, and which it takes by itself. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_LAST: Final = ("docker", "lo", "virbr")  # taken only where nothing else is


def selects(pattern: str, name: str) -> bool:
    """Whether NCCL_SOCKET_IFNAME=``pattern`` takes an interface: prefixes, ``=`` exact, ``^`` all but these."""
    is_excluding = pattern.startswith("^")
    rest = pattern.lstrip("^")
    is_exact = rest.startswith("=")
    words = [word for word in rest.lstrip("=").split(",") if word]
    matches = any(name == word if is_exact else name.startswith(word) for word in words)
    return matches != is_excluding


def default_choice(names: Sequence[str]) -> list[str]:
    """What NCCL takes without a filter: ib*, else all but docker, lo and virbr, else docker, else lo."""
    rules = (
        [name for name in names if name.startswith("ib")],
        [name for name in names if not name.startswith(_LAST)],
        [name for name in names if name.startswith("docker")],
        [name for name in names if name.startswith("lo")],
    )
    return next((chosen for chosen in rules if chosen), [])
