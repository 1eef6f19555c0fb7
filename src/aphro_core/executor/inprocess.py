"""One device: the worker lives in the engine's process, on one thread of its own."""

from __future__ import annotations

import faulthandler
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from aphro_core.config import EngineConfig
from aphro_core.host import available_memory_bytes
from aphro_core.messages.steps import StartWorker, StepPlan, StepResult, WorkerLoaded, WorkerProgress
from aphro_core.spawn import Spawner
from aphro_core.worker.worker import Worker

T = TypeVar("T")


class InProcessExecutor:
    def __init__(self, worker: Worker, results: ObjectReceiveStream[StepResult]) -> None:
        self.ranks: list[WorkerLoaded] = []
        self.results = results
        self._worker = worker
        self._send_plan, self._plans = anyio.create_memory_object_stream[StepPlan](math.inf)
        # the same thread every time: torch keeps a pool of OpenMP threads for each thread that computes
        self._thread = anyio.CapacityLimiter(1)

    async def load(self) -> None:
        self.ranks = [await self._call(self._worker.load)]

    async def allocate(self, num_blocks: int) -> None:
        await self._call(lambda: self._worker.allocate(num_blocks))

    async def submit(self, plan: StepPlan) -> None:
        await self._send_plan.send(plan)

    def dump_stacks(self) -> None:
        faulthandler.dump_traceback(all_threads=True)

    async def execute_plans(self, send_result: ObjectSendStream[StepResult]) -> None:
        async for plan in self._plans:
            result = await self._call(lambda plan=plan: self._worker.execute(plan))  # type: ignore[misc]
            assert result is not None, "a single rank is its own last stage"
            await send_result.send(result)

    async def _call(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(function, limiter=self._thread)


@asynccontextmanager
async def open_inprocess(
    config: EngineConfig, spawner: Spawner | None, on_progress: Callable[[WorkerProgress], None]
) -> AsyncIterator[InProcessExecutor]:
    """Build the one rank here. An exception that the worker does not survive is raised out of this block."""
    memory_bytes = int(available_memory_bytes() * config.cache.cpu_memory_utilization)
    start = StartWorker(config=config, rank=0, local_rank=0, store="", memory_bytes=memory_bytes)
    worker = Worker(start, lambda progress: anyio.from_thread.run_sync(on_progress, progress))
    send_result, results = anyio.create_memory_object_stream[StepResult](math.inf)
    executor = InProcessExecutor(worker, results)
    try:
        await executor.load()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(executor.execute_plans, send_result)
            yield executor
            tasks.cancel_scope.cancel()
    finally:
        worker.close()
