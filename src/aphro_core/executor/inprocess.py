"""One device, the worker in the engine's process: a CPU computes on a thread of its own, a GPU is launched here."""

from __future__ import annotations

import asyncio
import faulthandler
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from anyio.abc import ObjectReceiveStream

from aphro_core.config import EngineConfig
from aphro_core.host import available_memory_bytes
from aphro_core.messages.steps import StartWorker, StepPlan, StepResult, WorkerLoaded, WorkerProgress
from aphro_core.spawn import Spawner
from aphro_core.worker.results import Results, freeze_heap
from aphro_core.worker.worker import Worker

T = TypeVar("T")


class InProcessExecutor:
    def __init__(self, worker: Worker) -> None:
        self.ranks: list[WorkerLoaded] = []
        self._worker = worker
        self._send_result, results = anyio.create_memory_object_stream[StepResult](math.inf)
        self.results: ObjectReceiveStream[StepResult] = results
        self._send_plan, self._plans = anyio.create_memory_object_stream[StepPlan](math.inf)
        # the same thread every time: torch keeps a pool of OpenMP threads for each thread that computes
        self._thread = anyio.CapacityLimiter(1)
        loop = asyncio.get_running_loop()
        self._failure: BaseException | None = None
        self._failed = anyio.Event()
        self.waiting = Results(
            lambda result: _from_thread(loop, self._send_result.send_nowait, result),
            lambda error: _from_thread(loop, self._fail, error),
        )

    async def load(self) -> None:
        self.ranks = [await self._call(self._worker.load)]

    async def allocate(self, num_blocks: int) -> None:
        await self._call(lambda: self._worker.allocate(num_blocks))
        freeze_heap()

    async def submit(self, plan: StepPlan) -> None:
        if not self._worker.is_asynchronous:
            await self._send_plan.send(plan)
            return
        step = self._worker.launch(plan)
        assert step is not None, "a single rank is its own last stage"
        self.waiting.put(step)
        self._worker.settle()

    async def dump_stacks(self) -> None:
        faulthandler.dump_traceback(all_threads=True)

    async def execute_plans(self) -> None:
        """Those of a device that computes while it is asked."""
        async for plan in self._plans:
            step = await self._call(lambda plan=plan: self._worker.launch(plan))  # type: ignore[misc]
            assert step is not None, "a single rank is its own last stage"
            await self._send_result.send(step.result())
            self._worker.settle()

    async def raise_failure(self) -> None:
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._failed.set()

    async def _call(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(function, limiter=self._thread)


def _from_thread(loop: asyncio.AbstractEventLoop, function: Callable[[T], None], value: T) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, value)


@asynccontextmanager
async def open_inprocess(
    config: EngineConfig, spawner: Spawner | None, on_progress: Callable[[WorkerProgress], None]
) -> AsyncIterator[InProcessExecutor]:
    """Build the one rank here. An exception that the worker does not survive is raised out of this block."""
    memory_bytes = int(available_memory_bytes() * config.cache.cpu_memory_utilization)
    start = StartWorker(config=config, rank=0, local_rank=0, store="", memory_bytes=memory_bytes)
    worker = Worker(start, lambda progress: anyio.from_thread.run_sync(on_progress, progress))
    executor = InProcessExecutor(worker)
    try:
        await executor.load()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(executor.execute_plans)
            tasks.start_soon(executor.raise_failure)
            with executor.waiting:
                yield executor
            tasks.cancel_scope.cancel()
    finally:
        worker.close()
