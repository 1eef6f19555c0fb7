"""The hosts of a start: connected and looked at, all at once; a silent one is replaced if others have room."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import anyio
import msgspec

from aphro_core.config import EngineConfig, HostSlots
from aphro_core.errors import ModelError, PlacementError
from aphro_core.executor.host_checks import check_devices, check_files, check_versions
from aphro_core.parallel.placement import Place, place_ranks
from aphro_core.remote.local import LocalHost
from aphro_core.remote.remote import Host, HostUnreachableError
from aphro_core.remote.ssh import last_line, open_host
from aphro_core.worker.host_report import HostReport, report_host

_LOG: Final = logging.getLogger(__name__)
_REPORT_SECONDS: Final = 60.0  # a first import from a network file system takes its time


@dataclass(frozen=True)
class Node:
    """A host that takes ranks. ``fetches``: it lacks the model, or has another one, and is to read the engine's."""

    slots: HostSlots
    host: Host
    report: HostReport
    fetches: bool = False


@dataclass(frozen=True)
class Nodes:
    """``places`` in rank order; their ``host`` is a key of ``by_index``, the order of ``--hosts``."""

    by_index: dict[int, Node]
    places: list[Place]

    def num_ranks(self, index: int) -> int:
        return sum(place.host == index for place in self.places)


async def open_nodes(stack: AsyncExitStack, config: EngineConfig) -> Nodes:
    """Connect to as many of the hosts as the ranks need, and check them; ``stack`` ends the connections.

    Raises HostUnreachableError where no other host has room for the ranks of one that does not answer, and
    PlacementError or ModelError for a host that answers and cannot take part.
    """
    _check_names(config.parallel.hosts)
    hosts, opened = config.parallel.hosts, dict[int, Node]()
    lost: dict[int, HostUnreachableError] = {}
    ours = report_host(config.model.path)
    while True:
        places = _place(config, lost)
        num_ranks = Counter(place.host for place in places)

        async def open_one(index: int, num_ranks: int) -> None:
            try:
                opened[index] = await _open_node(stack, hosts[index], config, num_ranks, ours)
            except HostUnreachableError as error:
                lost[index] = error

        num_lost = len(lost)
        async with anyio.create_task_group() as tasks:
            for index in num_ranks.keys() - opened.keys():
                tasks.start_soon(open_one, index, num_ranks[index])
        if len(lost) == num_lost:
            return Nodes({index: opened[index] for index in sorted(num_ranks)}, places)


def _check_names(hosts: Sequence[HostSlots]) -> None:
    for name in (each.name.strip("[]") for each in hosts if len(hosts) > 1):
        if name == "localhost" or name.startswith("127.") or name == "::1":
            raise PlacementError(
                f"--hosts names {name} beside other hosts, which cannot reach it by that",
                hint=f"--hosts {socket.gethostname()},..., or the address that the others know this host by",
            )


def _place(config: EngineConfig, lost: dict[int, HostUnreachableError]) -> list[Place]:
    parallel = config.parallel
    slots = [0 if index in lost else each.num_slots for index, each in enumerate(parallel.hosts)]
    try:
        places = place_ranks(slots, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    except PlacementError:
        if lost:
            raise next(reversed(lost.values())) from None  # no spare: the last that did not answer is why
        raise
    if lost:
        used = ", ".join(sorted({parallel.hosts[place.host].name for place in places}))
        _LOG.warning("%s; the ranks start on %s", next(reversed(lost.values())).message, used)
    return places


async def _open_node(
    stack: AsyncExitStack, slots: HostSlots, config: EngineConfig, num_ranks: int, ours: HostReport
) -> Node:
    path, seconds = config.model.path, config.parallel.connect_timeout_seconds
    host = await stack.enter_async_context(open_host(slots.name, timeout_seconds=seconds))
    report = await _report(host, slots.name, path)
    check_versions(slots.name, report, ours)
    check_devices(slots.name, report, num_ranks, config.device)
    try:
        check_files(slots.name, path, report.files, ours.files)
    except ModelError:
        if config.model.model_from != "head" or isinstance(host, LocalHost):
            raise
        return Node(slots, host, report, fetches=True)
    return Node(slots, host, report)


async def _report(host: Host, name: str, path: str) -> HostReport:
    argv = (host.python, "-m", "aphro_core.worker.host_report", path)
    try:
        output = await host.run(*argv, timeout_seconds=_REPORT_SECONDS)
    except TimeoutError as error:
        hint = f"look there what `import torch` or reading {path} waits for: aphro doctor --hosts {name}"
        raise HostUnreachableError(str(error), hint=hint) from None
    if output.returncode != 0:
        raise PlacementError(
            f"{name} cannot run aphro: {last_line(output.stderr) or f'exit code {output.returncode}'}",
            hint=f"install it there in the same place: {host.python} must run `import aphro_core`",
        )
    return msgspec.json.decode(last_line(output.stdout), type=HostReport)
