"""Versions of what has to be equal on all hosts."""

from __future__ import annotations

import re

import msgspec

from aphro_core.doctor.probe import probe
from aphro_core.remote.remote import Host, read


async def read_versions(host: Host) -> dict[str, str]:
    """Name -> version, of what is there: aphro, torch, NCCL (as a package), Python, kernel, driver."""
    found = msgspec.convert(await probe(host, "versions"), dict[str, str | None])
    driver = re.search(
        r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", await read(host, "/proc/driver/nvidia/version") or ""
    )
    return {name: text for name, text in found.items() if text} | ({"driver": driver[1]} if driver else {})


async def torch_version(host: Host) -> str:
    """Empty where torch is not installed; ends in ``+cpu`` where it cannot use GPUs."""
    return (await read_versions(host)).get("torch", "")
