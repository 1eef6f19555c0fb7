"""Ranks on several hosts: each started over ssh, its channel the connection's stdio; no port listens for it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import msgspec

from aphro_core.channel import Channel
from aphro_core.config import EngineConfig, HostSlots
from aphro_core.environment import travelling
from aphro_core.errors import PlacementError
from aphro_core.executor.group import GroupExecutor, Launched, running
from aphro_core.executor.host_checks import check_devices, check_files, check_versions
from aphro_core.messages import codec
from aphro_core.messages.steps import FromWorker, StartWorker, ToWorker, WorkerProgress
from aphro_core.parallel.placement import Place, place_ranks
from aphro_core.remote.remote import Host, Process
from aphro_core.remote.ssh import SSH_FAILED, last_line, open_host
from aphro_core.spawn import Spawner
from aphro_core.worker.host_report import HostReport, report_host

_REPORT_SECONDS = 60.0  # a first import from a network file system takes its time


@dataclass(frozen=True)
class Node:
    """A host that takes ranks."""

    slots: HostSlots
    host: Host
    report: HostReport


class RemoteProcess:
    """A rank's process as far as it can be seen from here: by the command that started it."""

    was_short = False  # not known of another host

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    @property
    def is_lost(self) -> bool:
        return self.exit_code == SSH_FAILED

    def poll(self) -> bool:
        return self.exit_code is not None

    async def wait(self) -> None:
        await self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """To what runs here: when ssh ends, the rank's input closes, which is its sign to end."""
        if number == signal.SIGKILL:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def describe_end(self) -> str:
        if self.exit_code is None:
            return "closed its channel but has not ended"
        return f"ended ({last_line(self._process.stderr_tail) or f'exit code {self.exit_code}'})"

    def close(self) -> None:
        """Its block ends it."""


@asynccontextmanager
async def open_ssh(
    config: EngineConfig, spawner: Spawner | None, on_progress: Callable[[WorkerProgress], None]
) -> AsyncIterator[GroupExecutor]:
    """Look at every host, start the ranks, load the weights. Nothing of it is left anywhere when the block is left.

    Raises HostUnreachableError, PlacementError or ModelError for a host that cannot take part.
    """
    parallel = config.parallel
    slots = [each.num_slots for each in parallel.hosts]
    places = place_ranks(slots, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    num_ranks = Counter(place.host for place in places)
    async with AsyncExitStack() as stack:
        nodes = {i: await _open_node(stack, parallel.hosts[i], config, num_ranks[i]) for i in sorted(num_ranks)}

        async def launch(rank: int) -> Launched:
            place = places[rank]
            node = nodes[place.host]
            start = _start_message(config, rank, place, nodes, num_ranks[place.host])
            process = await stack.enter_async_context(
                node.host.start(node.host.python, "-m", "aphro_core.worker.remote_entry")
            )
            channel = Channel[ToWorker, FromWorker](process.stream, codec.engine_side_of_worker())
            return Launched(RemoteProcess(process), channel, start, node.slots.name)

        async with running(GroupExecutor(config, launch, on_progress), beats=True) as executor:
            yield executor


async def _open_node(stack: AsyncExitStack, slots: HostSlots, config: EngineConfig, num_ranks: int) -> Node:
    host, path = await stack.enter_async_context(open_host(slots.name)), config.model.path
    output = await host.run(host.python, "-m", "aphro_core.worker.host_report", path, timeout_seconds=_REPORT_SECONDS)
    if output.returncode != 0:
        raise PlacementError(
            f"{slots.name} cannot run aphro: {last_line(output.stderr) or f'exit code {output.returncode}'}",
            hint=f"install it there in the same place: {host.python} must run `import aphro_core`",
        )
    report = msgspec.json.decode(last_line(output.stdout), type=HostReport)
    ours = report_host(path)
    check_versions(slots.name, report, ours)
    check_devices(slots.name, report, num_ranks, config.device)
    check_files(slots.name, path, report.files, ours.files)
    return Node(slots, host, report)


def _start_message(
    config: EngineConfig, rank: int, place: Place, nodes: dict[int, Node], num_ranks: int
) -> StartWorker:
    node = nodes[place.host]
    environment = travelling(os.environ)
    if config.device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(max(1, node.report.num_cores // num_ranks)))
    return StartWorker(
        config=config,
        rank=rank,
        local_rank=place.device,
        store="",
        memory_bytes=int(node.report.memory_bytes * config.cache.cpu_memory_utilization / num_ranks),
        environment=environment,
        peers=[other.host.address for i, other in nodes.items() if i != place.host],
    )
