"""Several devices on this host: one process a rank, forked from a warm server that has torch imported."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.context import ForkServerProcess
from typing import Final

import anyio
import anyio.to_thread
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from aphro_core.channel import Channel, ChannelClosedError
from aphro_core.config import EngineConfig
from aphro_core.errors import AphroError, EngineDeadError, ExitCode
from aphro_core.host import available_memory_bytes
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
from aphro_core.worker import entry

_STOP_SECONDS: Final = 2.0  # for a rank to end by itself before it is killed
_BLAME_SECONDS: Final = 0.5  # after a first death: time for the others to report, so that the first cause is found


class WorkerHandle:
    """One rank: its process and the engine's end of its channel."""

    def __init__(self, rank: int, process: ForkServerProcess, channel: Channel[ToWorker, FromWorker]) -> None:
        self.rank = rank
        self.process = process
        self.channel = channel
        self.loaded: WorkerLoaded | None = None
        self.failed: WorkerFailed | None = None
        self.is_ready = False
        self.is_gone = False
        self.gone_at = math.inf

    def death(self) -> str:
        """How the process ended, as an operator says it."""
        code = self.process.exitcode
        if code is None:
            return "closed its channel but has not ended"
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"exited with code {code}"


class MultiprocessExecutor:
    def __init__(self, config: EngineConfig, on_progress: Callable[[WorkerProgress], None]) -> None:
        self._config = config
        self._on_progress = on_progress
        self._workers: list[WorkerHandle] = []
        self._send_result, self.results = _result_stream()
        self._changed = anyio.Event()
        self._is_stopping = False

    @property
    def ranks(self) -> list[WorkerLoaded]:
        return [worker.loaded for worker in self._workers if worker.loaded is not None]

    async def start(self, store: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([entry.__name__, "aphro_core.worker.worker"])
        world_size = self._config.parallel.world_size
        memory_bytes = int(available_memory_bytes() * self._config.cache.cpu_memory_utilization / world_size)
        for rank in range(world_size):
            ours, theirs = socket.socketpair()
            process = context.Process(target=entry.main, args=(theirs,), name=f"aphro-rank-{rank}")
            # the first start waits for the fork server to import torch: not on the event loop
            await anyio.to_thread.run_sync(process.start)
            theirs.close()
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

    async def watch(self, worker: WorkerHandle) -> None:
        """Take one rank's frames until it is gone; then name the first cause, unless we are stopping."""
        try:
            while True:
                await self._take(worker, await worker.channel.receive())
        except ChannelClosedError:
            worker.is_gone, worker.gone_at = True, time.monotonic()
        if not self._is_stopping:
            await anyio.sleep(_BLAME_SECONDS)
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
        worker.process.join(timeout=_BLAME_SECONDS)
        failed, pid = worker.failed, worker.process.pid
        host = failed.host if failed else socket.gethostname()
        where = f"rank {worker.rank} on {host} (pid {pid})"
        if failed is None:
            return EngineDeadError(f"{where} {worker.death()}", hint=_hint_for_death(worker.process.exitcode))
        error = AphroError(f"{where}: {failed.message}", hint=failed.hint, exit_code=ExitCode(failed.exit_code))
        error.add_note(failed.traceback)
        return error

    async def stop(self) -> None:
        """End every rank: asked first, killed after a while, reaped in the end."""
        self._is_stopping = True
        await self._broadcast(StopWorker())
        await anyio.to_thread.run_sync(self._reap)
        for worker in self._workers:
            await worker.channel.aclose()

    def _reap(self) -> None:
        deadline = time.monotonic() + _STOP_SECONDS
        for worker in self._workers:
            worker.process.join(timeout=max(0.0, deadline - time.monotonic()))
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(timeout=_STOP_SECONDS)


def _result_stream() -> tuple[ObjectSendStream[StepResult], ObjectReceiveStream[StepResult]]:
    return anyio.create_memory_object_stream[StepResult](math.inf)


def _hint_for_death(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        return "the kernel kills like this when memory is short (`dmesg | grep -i oom`); lower --cpu-memory-utilization"
    return "start again with `--log-level debug` and read that rank's lines"


@asynccontextmanager
async def open_multiprocess(
    config: EngineConfig, on_progress: Callable[[WorkerProgress], None]
) -> AsyncIterator[MultiprocessExecutor]:
    """Start one process a rank on this host and load the weights. Nothing of it is left when the block is left."""
    executor = MultiprocessExecutor(config, on_progress)
    # ranks meet in a file that has no name: nothing to clean up, and no other user can open it
    store_fd = os.memfd_create("aphro-store")
    try:
        await executor.start(f"/proc/{os.getpid()}/fd/{store_fd}")
        async with anyio.create_task_group() as tasks:
            for worker in executor._workers:
                tasks.start_soon(executor.watch, worker)
            await executor.wait_loaded()
            yield executor
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await executor.stop()
        os.close(store_fd)
