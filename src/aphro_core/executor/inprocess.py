"""One device, the worker in the engine's process: a CPU computes on a thread of its own, a GPU is launched here."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from queue import SimpleQueue
from typing import Final, TypeVar

import anyio
import anyio.to_thread
from anyio.abc import ObjectReceiveStream

from aphro_core.config import EngineConfig
from aphro_core.host import available_memory_bytes
from aphro_core.messages.steps import StartWorker, StepPlan, StepResult, WorkerLoaded, WorkerProgress
from aphro_core.spawn import Spawner
from aphro_core.worker.results import Results, freeze_heap
from aphro_core.worker.worker import Worker

T = TypeVar("T")
_LOG: Final = logging.getLogger(__name__)
_END_SECONDS: Final = 1.0
_SWITCH_SECONDS: Final = 1e-4  # from one of Python's threads to another that waits


class InProcessExecutor:
    def __init__(self, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
        self.ranks: list[WorkerLoaded] = []
        self._worker = worker
        self._send_result, results = anyio.create_memory_object_stream[StepResult](math.inf)
        self.results: ObjectReceiveStream[StepResult] = results
        self._loop = loop
        # the same thread every time: torch keeps a pool of OpenMP threads for each thread that computes
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._compute, name="worker", daemon=True)
        self._is_dead = False
        self._failure: BaseException | None = None
        self._failed = anyio.Event()
        self._waiting = Results(
            lambda result: _from_thread(loop, self._send_result.send_nowait, result),
            lambda error: _from_thread(loop, self._fail, error),
            worker.enter_thread,
        )

    async def load(self) -> None:
        # between two steps the loop speaks to the API process, and the worker must not wait for all of that
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread.start()
        self.ranks = [await self._call(self._worker.load)]
        self._waiting.start()  # only now: it enters the device, and why that fails is told once

    async def allocate(self, num_blocks: int) -> None:
        await self._call(lambda: self._worker.allocate(num_blocks))
        freeze_heap()

    async def submit(self, plan: StepPlan) -> None:
        if not self._worker.is_asynchronous:
            self._calls.put(lambda: self._execute(plan))
            return
        step = self._worker.launch(plan)
        assert step is not None, "a single rank is its own last stage"
        self._waiting.put(step)
        self._worker.settle()

    async def dump_stacks(self) -> None:
        faulthandler.dump_traceback(all_threads=True)

    async def raise_failure(self) -> None:
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    async def aclose(self) -> None:
        """End the threads, once the steps that they compute or wait for are done; those behind are not begun. One that
        hangs keeps its worker till the process ends."""
        self._is_dead = True
        with anyio.CancelScope(shield=True):
            has_ended = await anyio.to_thread.run_sync(self._end_threads)
        if has_ended:
            self._worker.close()
        else:
            _LOG.warning("a step has not ended %g s after the engine; it ends with its process", _END_SECONDS)

    def _end_threads(self) -> bool:
        """Not on the loop: it waits."""
        until = time.monotonic() + _END_SECONDS
        self._calls.put(None)
        if self._thread.ident is not None:  # it was started
            self._thread.join(_END_SECONDS)
        has_ended = self._waiting.end(max(0.0, until - time.monotonic()))
        return has_ended and not self._thread.is_alive()

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._failed.set()

    def _compute(self) -> None:
        while not self._is_dead and (call := self._calls.get()) is not None:
            call()

    def _execute(self, plan: StepPlan) -> None:
        try:
            step = self._worker.launch(plan)
            assert step is not None, "a single rank is its own last stage"
            _from_thread(self._loop, self._send_result.send_nowait, step.result())
            self._worker.settle()
        except BaseException as error:
            _from_thread(self._loop, self._fail, error)
            self._is_dead = True  # plans behind this one would build on half a step

    async def _call(self, function: Callable[[], T]) -> T:
        answer: asyncio.Future[T] = self._loop.create_future()

        def call() -> None:
            try:
                _from_thread(self._loop, _answer, answer, function())
            except BaseException as error:
                _from_thread(self._loop, _refuse, answer, error)

        self._calls.put(call)
        return await answer


def _answer(future: asyncio.Future[T], value: T) -> None:
    if not future.cancelled():
        future.set_result(value)


def _refuse(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.cancelled():
        future.set_exception(error)


def _from_thread(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *values: object) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(function, *values)


@asynccontextmanager
async def open_inprocess(
    config: EngineConfig, spawner: Spawner | None, on_progress: Callable[[WorkerProgress], None]
) -> AsyncIterator[InProcessExecutor]:
    """Build the one rank here. An exception that the worker does not survive is raised out of this block."""
    memory_bytes = int(available_memory_bytes() * config.cache.cpu_memory_utilization)
    start = StartWorker(config=config, rank=0, local_rank=0, store="", memory_bytes=memory_bytes)
    loop = asyncio.get_running_loop()
    worker = Worker(start, lambda progress: _from_thread(loop, on_progress, progress))
    executor = InProcessExecutor(worker, loop)
    try:
        await executor.load()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(executor.raise_failure)
            yield executor
            tasks.cancel_scope.cancel()
    finally:
        await executor.aclose()
