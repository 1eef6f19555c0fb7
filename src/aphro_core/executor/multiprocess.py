"""Several devices on this host: one process a rank, forked from a warm server that has torch imported."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import anyio
import anyio.to_thread
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from aphro_core.channel import Channel, ChannelClosedError
from aphro_core.config import EngineConfig
from aphro_core.errors import AphroError, EngineDeadError, ExitCode
from aphro_core.host import available_memory_bytes, num_oom_kills
from aphro_core.lifeline import STACKS_SIGNAL
from aphro_core.messages import codec
from aphro_core.messages.steps import (
    AllocateCache,
    FromWorker,
    StartWorker,
    StepPlan,
    StepResult,
    StopWorker,
    ToWorker,
    WorkerFailed,
    WorkerLoaded,
    WorkerProgress,
    WorkerReady,
)
from aphro_core.spawn import Child, Spawner

_STOP_SECONDS: Final = 2.0  # for a rank to end by itself before it is killed
_BLAME_SECONDS: Final = 0.5  # after a first death: time for the others to report, so that the first cause is found


class WorkerHandle:
    """One rank: its process and the engine's end of its channel."""

    def __init__(self, rank: int, process: Child, channel: Channel[ToWorker, FromWorker]) -> None:
        self.rank = rank
        self.process = process
        self.channel = channel
        self.loaded: WorkerLoaded | None = None
        self.failed: WorkerFailed | None = None
        self.is_ready = False
        self.is_gone = False
        self.gone_at = math.inf


class MultiprocessExecutor:
    def __init__(self, config: EngineConfig, spawner: Spawner, on_progress: Callable[[WorkerProgress], None]) -> None:
        self._config = config
        self._spawner = spawner
        self._num_oom_kills = num_oom_kills()
        self._on_progress = on_progress
        self._workers: list[WorkerHandle] = []
        self._send_result, self.results = _result_stream()
        self._changed = anyio.Event()
        self._is_stopping = False

    @property
    def ranks(self) -> list[WorkerLoaded]:
        return [worker.loaded for worker in self._workers if worker.loaded is not None]

    async def start(self, store: str) -> None:
        world_size = self._config.parallel.world_size
        memory_bytes = int(available_memory_bytes() * self._config.cache.cpu_memory_utilization / world_size)
        for rank in range(world_size):
            ours, theirs = socket.socketpair()
            with theirs:
                process = await anyio.to_thread.run_sync(self._spawner.fork, "worker", f"aphro-rank-{rank}", theirs)
            channel = await Channel[ToWorker, FromWorker].over(ours, codec.engine_side_of_worker())
            self._workers.append(WorkerHandle(rank, process, channel))
            await channel.send(
                StartWorker(config=self._config, rank=rank, local_rank=rank, store=store, memory_bytes=memory_bytes)
            )

    async def wait_loaded(self) -> None:
        await self._wait_all(lambda worker: worker.loaded is not None, self._config.start_timeout_seconds, "load")

    async def allocate(self, num_blocks: int) -> None:
        await self._broadcast(AllocateCache(num_blocks=num_blocks))
        await self._wait_all(
            lambda worker: worker.is_ready, self._config.start_timeout_seconds, "allocate its KV cache"
        )

    async def submit(self, plan: StepPlan) -> None:
        await self._broadcast(plan)

    def dump_stacks(self) -> None:
        for worker in self._workers:
            worker.process.send_signal(STACKS_SIGNAL)

    async def watch(self, worker: WorkerHandle) -> None:
        """Take one rank's frames until it is gone; then name the first cause, unless we are stopping."""
        try:
            while True:
                await self._take(worker, await worker.channel.receive())
        except ChannelClosedError:
            worker.is_gone, worker.gone_at = True, time.monotonic()
        if not self._is_stopping:
            with anyio.move_on_after(_BLAME_SECONDS):
                await worker.process.wait()
            if worker.failed is not None and worker.failed.secondary:
                await anyio.sleep(_BLAME_SECONDS)  # it only lost a peer, whose own end is about to be known
            raise self._first_cause()

    async def _take(self, worker: WorkerHandle, message: FromWorker) -> None:
        match message:
            case StepResult():
                await self._send_result.send(message)
            case WorkerProgress():
                self._on_progress(message)
            case WorkerLoaded():
                worker.loaded = message
            case WorkerReady():
                worker.is_ready = True
            case WorkerFailed():
                worker.failed = message
        self._changed.set()
        self._changed = anyio.Event()

    async def _wait_all(self, is_done: Callable[[WorkerHandle], bool], seconds: float, what: str) -> None:
        with anyio.move_on_after(seconds):
            while not all(is_done(worker) for worker in self._workers):
                await self._changed.wait()
            return
        late = [str(worker.rank) for worker in self._workers if not is_done(worker)]
        raise EngineDeadError(
            f"rank {', '.join(late)} did not {what} within {seconds:g} s",
            hint="raise --start-timeout, or look at what that process waits for",
        )

    async def _broadcast(self, message: ToWorker) -> None:
        for worker in self._workers:
            try:
                await worker.channel.send(message)
            except ChannelClosedError:
                return  # its watcher names the cause

    def _first_cause(self) -> AphroError:
        """A rank that failed by itself, else one that was killed, else whoever went first; peers only echo it."""
        gone = sorted((worker for worker in self._workers if worker.is_gone), key=lambda worker: worker.gone_at)
        own = [worker for worker in gone if worker.failed is not None and not worker.failed.secondary]
        silent = [worker for worker in gone if worker.failed is None]
        worker = (own or silent or gone)[0]
        worker.process.poll()
        failed, pid = worker.failed, worker.process.pid
        host = failed.host if failed else socket.gethostname()
        where = f"rank {worker.rank} on {host} (pid {pid})"
        if failed is None:
            return _explain_end(where, worker.process, was_short=num_oom_kills() > self._num_oom_kills)
        error = EngineDeadError(f"{where}: {failed.message}", hint=failed.hint, exit_code=ExitCode(failed.exit_code))
        error.add_note(failed.traceback)
        return error

    async def stop(self, *, at_once: bool) -> None:
        """End every rank: asked first unless ``at_once``, killed after a while, gone in the end."""
        self._is_stopping = True
        if not at_once:
            with anyio.move_on_after(_STOP_SECONDS):
                await self._broadcast(StopWorker())
                for worker in self._workers:
                    await worker.process.wait()
        for worker in self._workers:
            if not worker.process.poll():
                worker.process.send_signal(signal.SIGKILL)
        with anyio.move_on_after(_STOP_SECONDS):  # else the fork server says so when this engine is gone
            for worker in self._workers:
                await worker.process.wait()
        for worker in self._workers:
            worker.process.close()
            await worker.channel.aclose()


def _result_stream() -> tuple[ObjectSendStream[StepResult], ObjectReceiveStream[StepResult]]:
    return anyio.create_memory_object_stream[StepResult](math.inf)


def _explain_end(where: str, process: Child, *, was_short: bool) -> EngineDeadError:
    """``was_short``: the kernel has killed something for want of memory since the group started."""
    is_killed = process.exit_code == -signal.SIGKILL
    if is_killed and was_short:
        hint = "the kernel killed it because memory was short: lower --cpu-memory-utilization"
    elif is_killed:
        hint = "somebody killed it: the kernel has not run out of memory since the start"
    else:
        hint = "start again with `--log-level debug` and read that rank's lines"
    return EngineDeadError(f"{where} {process.describe_end()}", hint=hint, is_external=is_killed and not was_short)


@asynccontextmanager
async def open_multiprocess(
    config: EngineConfig, spawner: Spawner | None, on_progress: Callable[[WorkerProgress], None]
) -> AsyncIterator[MultiprocessExecutor]:
    """Start one process a rank on this host and load the weights. Nothing of it is left when the block is left."""
    assert spawner is not None, "ranks are processes of their own"
    executor = MultiprocessExecutor(config, spawner, on_progress)
    has_failed = True
    # ranks meet in a file that has no name: nothing to clean up, and no other user can open it
    store_fd = os.memfd_create("aphro-store")
    try:
        await executor.start(f"/proc/{os.getpid()}/fd/{store_fd}")
        async with anyio.create_task_group() as tasks:
            for worker in executor._workers:
                tasks.start_soon(executor.watch, worker)
            await executor.wait_loaded()
            yield executor
            has_failed = False
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await executor.stop(at_once=has_failed)
        os.close(store_fd)
