"""A group of worker processes, wherever they run: started by a launcher, watched, named when one dies, ended."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
import msgspec
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from aphro_core.channel import ChannelClosedError
from aphro_core.config import EngineConfig
from aphro_core.executor.causes import first_cause, late, stopped
from aphro_core.executor.host_lines import HostLines
from aphro_core.executor.rank import Launched, WorkerHandle
from aphro_core.executor.served_model import ServedModel
from aphro_core.executor.store import GroupStore
from aphro_core.host import StopWatch, num_oom_kills
from aphro_core.lifeline import STACKS_SIGNAL
from aphro_core.messages.model_source import FetchModel, ModelBytes
from aphro_core.messages.steps import (
    AllocateCache,
    Beat,
    DumpStacks,
    FromWorker,
    StepPlan,
    StepResult,
    StopWorker,
    StoreCall,
    ToWorker,
    WorkerAlive,
    WorkerFailed,
    WorkerLoaded,
    WorkerLog,
    WorkerProgress,
    WorkerReady,
)

_BEAT_SECONDS: Final = 2.0
_STOP_SECONDS: Final = 2.0  # for a rank to end by itself before it is killed
_SILENT_SECONDS: Final = 30.0  # a rank that starts, while others have come to meet: more than one import holds it up
_LOOK_SECONDS: Final = 1.0
_STOPPED_LOOKS: Final = 3
_LINES_SECONDS: Final = 0.5  # for the last lines of other hosts to be written
_BLAME_SECONDS: Final = 0.5  # after a first death: time for the others to report, so that the first cause is found


class GroupExecutor:
    """``launch`` starts the process of a rank; the group does the rest."""

    def __init__(
        self,
        config: EngineConfig,
        launch: Callable[[int], Awaitable[Launched]],
        on_progress: Callable[[WorkerProgress], None],
        model: ServedModel | None = None,
    ) -> None:
        """``model``: what ranks on hosts without it may fetch."""
        self._config = config
        self._model = model
        self._launch = launch
        self._store = GroupStore()
        self._lines = HostLines()
        self._num_oom_kills = num_oom_kills()
        self._on_progress = on_progress
        self.workers: list[WorkerHandle] = []
        self._send_result, self.results = _result_stream()
        self._speaker = config.parallel.world_size - config.parallel.tensor_parallel_size
        self._failed: StepResult | None = None  # elsewhere than at the rank that speaks
        self._last_step_id = 0
        self._changed = anyio.Event()
        self._is_stopping = False

    @property
    def ranks(self) -> list[WorkerLoaded]:
        return [worker.loaded for worker in self.workers if worker.loaded is not None]

    async def start(self) -> None:
        for rank in range(self._config.parallel.world_size):
            launched = await self._launch(rank)
            self.workers.append(WorkerHandle(launched))
            await launched.channel.send(launched.start)

    async def wait_loaded(self) -> None:
        """A rank that is still on its way says so; one that is silent while others have come is not waited for."""
        began, limit = time.monotonic(), self._config.start_timeout_seconds
        while not all(worker.has_come for worker in self.workers) and time.monotonic() - began < limit:
            if silent := self._silent_ranks():
                raise late(silent, "come to meet the others", _SILENT_SECONDS, "")
            with anyio.move_on_after(_LOOK_SECONDS):
                await self._changed.wait()
        left = began + limit - time.monotonic()
        await self._wait_all(lambda worker: worker.loaded is not None, limit, "load", left)

    async def find_stopped(self) -> None:
        """Until all are ready, from when on their steps are watched: who is stopped here is not waited for."""
        watch = StopWatch(_STOPPED_LOOKS)
        while not all(worker.is_ready for worker in self.workers):
            await anyio.sleep(_LOOK_SECONDS)
            for worker in self.workers:
                if not worker.is_remote and not worker.is_ready and watch.is_stopped(worker.process.pid):
                    raise stopped(worker)

    def _silent_ranks(self) -> list[WorkerHandle]:
        if not any(worker.has_come for worker in self.workers):
            return []
        long_ago = time.monotonic() - _SILENT_SECONDS
        return [worker for worker in self.workers if not worker.has_come and worker.heard_at < long_ago]

    async def allocate(self, num_blocks: int) -> None:
        await self._broadcast(AllocateCache(num_blocks=num_blocks))
        await self._wait_all(
            lambda worker: worker.is_ready, self._config.start_timeout_seconds, "allocate its KV cache"
        )

    async def submit(self, plan: StepPlan) -> None:
        self._last_step_id = plan.step_id
        if plan.forgets_all:
            self._failed = None
        await self._broadcast(plan)

    def _as_it_is(self, result: StepResult) -> StepResult:
        """With the failure of another rank in this step or before it: its cause, and what the cause may be."""
        failed = self._failed
        if failed is None or result.step_id < failed.step_id:
            return result
        return msgspec.structs.replace(failed, step_id=result.step_id)

    async def dump_stacks(self) -> None:
        for worker in self.workers:
            if worker.is_remote:
                await self._send(worker, DumpStacks())
            else:
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
            raise first_cause(self.workers, num_oom_kills() - self._num_oom_kills)

    async def _take(self, worker: WorkerHandle, message: FromWorker) -> None:
        worker.heard_at = time.monotonic()
        match message:
            case StepResult() if worker.rank != self._speaker:
                if message.step_id <= self._last_step_id:  # else it comes late, when all is forgotten and counted anew
                    self._failed = self._failed or message
            case StepResult():
                await self._send_result.send(self._as_it_is(message))
            case WorkerProgress():
                worker.has_come = True
                self._on_progress(message)
            case WorkerAlive():
                return
            case WorkerLoaded():
                worker.loaded = message
            case WorkerReady():
                worker.is_ready = True
            case WorkerFailed():
                worker.failed = message
            case StoreCall():
                await self._send(worker, self._store.answer(message))
                return
            case FetchModel():
                await self._send(worker, await self._answer(message))
                return
            case WorkerLog():
                self._lines.put(f"[{worker.host} rank {message.rank}] {message.line}")
                return
        self._changed.set()
        self._changed = anyio.Event()

    async def _answer(self, call: FetchModel) -> ModelBytes:
        if self._model is None:
            return ModelBytes(call.number, problem="this start hands out no model")
        return await self._model.answer(call)

    async def _wait_all(
        self, is_done: Callable[[WorkerHandle], bool], seconds: float, what: str, left: float | None = None
    ) -> None:
        """``left`` of the allowed ``seconds``: all of them unless told otherwise."""
        with anyio.move_on_after(seconds if left is None else max(left, 0.0)):
            while not all(is_done(worker) for worker in self.workers):
                await self._changed.wait()
            return
        raise late([worker for worker in self.workers if not is_done(worker)], what, seconds)

    async def _broadcast(self, message: ToWorker) -> None:
        for worker in self.workers:
            await self._send(worker, message)

    async def _send(self, worker: WorkerHandle, message: ToWorker) -> None:
        with suppress(ChannelClosedError):  # its watcher names the cause
            await worker.channel.send(message)

    async def beat(self) -> None:
        """For ever: workers of other hosts end themselves when they hear nothing for a while."""
        while True:
            await self._broadcast(Beat())
            await anyio.sleep(_BEAT_SECONDS)

    async def stop(self, *, at_once: bool) -> None:
        """End every rank: asked first unless ``at_once``, killed after a while, gone in the end."""
        self._is_stopping = True
        if not at_once:
            with anyio.move_on_after(_STOP_SECONDS):
                await self._broadcast(StopWorker())
                for worker in self.workers:
                    await worker.process.wait()
        for worker in self.workers:
            if not worker.process.poll():
                worker.process.send_signal(signal.SIGKILL)
        with anyio.move_on_after(_STOP_SECONDS):  # else the fork server says so when this engine is gone
            for worker in self.workers:
                await worker.process.wait()
        for worker in self.workers:
            worker.process.close()
            await worker.channel.aclose()
        await self._lines.drain(_LINES_SECONDS)


def _result_stream() -> tuple[ObjectSendStream[StepResult], ObjectReceiveStream[StepResult]]:
    return anyio.create_memory_object_stream[StepResult](math.inf)


@asynccontextmanager
async def running(executor: GroupExecutor, *, beats: bool = False) -> AsyncIterator[GroupExecutor]:
    """Start every rank and load the weights. Nothing of them is left when the block is left."""
    has_failed = True
    try:
        await executor.start()
        async with anyio.create_task_group() as tasks:
            for worker in executor.workers:
                tasks.start_soon(executor.watch, worker)
            tasks.start_soon(executor.find_stopped)
            if beats:
                tasks.start_soon(executor.beat)
            await executor.wait_loaded()
            yield executor
            has_failed = False
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await executor.stop(at_once=has_failed)
