"""Versions that nodes must share: read without importing anything, and compared before a host joins."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("aphro", "torch", "ray")
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_OF_GPUS: Final = ("CUDA", "NCCL", "driver")
NOT_THERE: Final = "not there"


@dataclass(frozen=True, slots=True)
class Difference:
    """``is_fatal``: ranks of these two nodes could not talk, or would compute differently. ``remedy`` can be typed."""

    name: str
    here: str
    head: str
    is_fatal: bool
    remedy: str

    def __str__(self) -> str:
        return f"{self.name} {self.here} here, {self.head} on the head"


def installed_versions() -> dict[str, str]:
    """Name -> version of what is there: Python, aphro, torch, ray; CUDA and NCCL, as torch brings them; the driver."""
    found = {"Python": ".".join(map(str, sys.version_info[:3]))}
    found |= {name: version for name in _PACKAGES if (version := _version_of(name))}
    if cuda := _cuda_of_torch():
        found["CUDA"] = cuda
    if nccl := _version_of("nvidia-nccl-cu13") or _version_of("nvidia-nccl-cu12"):
        found["NCCL"] = nccl
    try:
        driver = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER.read_text())
    except OSError:
        driver = None
    return found | ({"driver": driver[1]} if driver else {})


def compare(here: Mapping[str, str], head: Mapping[str, str], *, both_have_gpus: bool) -> list[Difference]:
    """What differs, the fatal first. What only GPUs need counts only where both nodes have some."""
    names = dict.fromkeys([*head, *here])
    found = [_difference(name, here.get(name, NOT_THERE), head.get(name, NOT_THERE), both_have_gpus) for name in names]
    return sorted((each for each in found if each is not None), key=lambda each: not each.is_fatal)


def _difference(name: str, here: str, head: str, both_have_gpus: bool) -> Difference | None:
    if here == head or (name in _OF_GPUS and not both_have_gpus):
        return None
    if name == "Python":
        is_fatal, remedy = _minor(here) != _minor(head), f"an environment of Python {_minor(head)} on this host"
    elif name == "driver":
        is_fatal, remedy = False, f"driver {head} on this host"
    elif name in ("CUDA", "NCCL"):
        is_fatal, remedy = True, "the torch of the head: its package brings both"
    else:
        # torch +cpu beside torch +cu130 is the same torch where only one of the two has GPUs
        is_fatal = both_have_gpus or here.partition("+")[0] != head.partition("+")[0]
        remedy = f"pip install {name}=={head}"
    return Difference(name, here, head, is_fatal, remedy)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cuda_of_torch() -> str:
    """From torch's own version file, which importing torch would read too, a second later."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return ""
    try:
        text = (Path(found.origin).parent / "version.py").read_text()
    except OSError:
        return ""
    cuda = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return cuda[1] if cuda else ""
