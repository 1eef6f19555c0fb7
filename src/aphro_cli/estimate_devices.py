"""The devices that an estimate is about: a named card, a size of memory, or what this host has."""

from __future__ import annotations

from typing import Literal

from aphro_cli.estimate_options import parse_memory
from aphro_core import host
from aphro_core.errors import UsageError
from aphro_core.estimate.cards import GIB, Card, card_of_size, find_card
from aphro_core.estimate.question import DeviceFacts


def find_devices(
    gpu: str | None, gpu_memory: str | None, device: Literal["auto", "cuda", "cpu"], *, is_ours: bool
) -> DeviceFacts:
    """``is_ours``: aphro, which serves on CPUs too. Raises UsageError for an unknown card or a host without GPUs."""
    if gpu is not None:
        return _named(gpu, gpu_memory)
    if gpu_memory is not None:
        total = parse_memory(gpu_memory)
        near = card_of_size(total)
        origin = f"a card of {total / GIB:.2f} GiB is taken for a {near.name} (--gpu NAME tells)" if near else ""
        return DeviceFacts(kind="cuda", total_bytes=total, card=near, origin=origin)
    found = host.gpu_memory() if device != "cpu" else []
    if found:
        return _local_gpus(found)
    if device == "cuda" or not is_ours:
        raise UsageError("this host shows no NVIDIA GPU, and none is named", hint="--gpu H100, or --gpu-memory 24GiB")
    free = host.available_memory_bytes()
    origin = f"{free / GIB:.2f} GiB of this host are free now"
    return DeviceFacts(kind="cpu", total_bytes=free, count=host.num_cores(), origin=origin)


def _named(gpu: str, gpu_memory: str | None) -> DeviceFacts:
    """A card of the table; one that is not in it only with its memory."""
    if gpu_memory is None:
        card = find_card(gpu)
        origin = f"{card.name}: {card.total_gib:g} GiB as servers print it (ECC, MIG, displays lower it)"
        return DeviceFacts(kind="cuda", total_bytes=card.total_bytes, card=card, origin=origin)
    total = parse_memory(gpu_memory)
    known = _known(gpu, total)
    is_other = known is None or known != _known(gpu, 0)
    origin = f"{gpu} is not in the table of cards: nothing is known but its memory" if is_other else ""
    return DeviceFacts(kind="cuda", total_bytes=total, card=known, origin=origin)


def _local_gpus(found: list[host.GpuMemory]) -> DeviceFacts:
    """The smallest counts, and what others hold of the fullest."""
    smallest = min(found, key=lambda each: each.total_bytes)
    free = min(each.free_bytes for each in found)
    return DeviceFacts(
        kind="cuda",
        total_bytes=smallest.total_bytes,
        card=_known(smallest.name, smallest.total_bytes),
        foreign_bytes=max(each.total_bytes - each.free_bytes for each in found),
        count=len(found),
        origin=f"{len(found)} x {smallest.name} of this host, at least {free / GIB:.2f} GiB free now",
    )


def _known(name: str, total_bytes: int) -> Card | None:
    """By its name, else by its size."""
    try:
        return find_card(name)
    except UsageError:
        return card_of_size(total_bytes) if total_bytes else None
