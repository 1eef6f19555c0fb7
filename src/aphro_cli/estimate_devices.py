"""The devices that an estimate is about: a named card, a size of memory, or what this host has."""

from __future__ import annotations

from typing import Literal

from aphro_cli.estimate_options import parse_memory
from aphro_core import host
from aphro_core.errors import ClusterError, UsageError
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


def cluster_devices() -> tuple[DeviceFacts, int]:
    """Those of the joined cluster, and how many of them the smallest node has: groups must fit into each.

    Of GPUs the smallest counts, and what others hold of the fullest; on CPUs as much on each node as on the one with
    least. Raises ClusterError where this host is in none.
    """
    from aphro_core.cluster.asking import membership, read_status

    rows = [row for row in read_status(membership()).rows if row.state == "in" and row.memory is not None]
    if not rows:
        raise ClusterError("no node of the cluster answers", hint="aphro cluster status")
    count, least = sum(row.node.devices for row in rows), min(row.node.devices for row in rows)
    memories = [row.memory for row in rows if row.memory is not None]
    names = sorted({name for row in rows for name in row.node.device_names})
    totals = [size for memory in memories for size in memory.gpu_total_bytes]
    if totals:
        taken = [
            total - free for m in memories for total, free in zip(m.gpu_total_bytes, m.gpu_free_bytes, strict=True)
        ]
        origin = f"{count} x {', '.join(names)} of {len(rows)} nodes of the cluster; the smallest counts"
        card = _known(names[0], min(totals)) if names else None
        devices = DeviceFacts(
            kind="cuda",
            total_bytes=min(totals),
            card=card,
            foreign_bytes=max(taken),
            count=count,
            slots=tuple(row.node.devices for row in rows),
            origin=origin,
        )
        return devices, least
    free = min(memory.free_bytes for memory in memories)
    origin = f"{count} ranks on {len(rows)} nodes of the cluster, at least {free / GIB:.2f} GiB free on each"
    return DeviceFacts(kind="cpu", total_bytes=free, count=count, per_host=least, origin=origin), least


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
