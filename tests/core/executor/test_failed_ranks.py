"""A step that fails on a rank that does not speak: its cause counts, from that step on, until all is forgotten."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from aphro_core.executor.group import running
from aphro_core.messages.steps import FromWorker, StepFailure, StepPlan, StepResult, WorkerLoaded
from tests.core.executor.test_late_ranks import executor_of

CAUSE = StepFailure("MemoryError: no", None)
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_the_failure_of_another_rank_counts_from_its_step_until_all_is_forgotten() -> None:
    send = {}

    async def script(rank: int) -> AsyncIterator[FromWorker]:
        yield WorkerLoaded(rank, 1, f"host{rank}", "cpu", 0, 0, 0, 0, 0, 0)
        send[rank], said = anyio.create_memory_object_stream[FromWorker](10)
        async for message in said:
            yield message

    async def tell(rank: int, *results: StepResult) -> None:
        for result in results:
            await send[rank].send(result)
        await anyio.wait_all_tasks_blocked()

    def heard() -> list[tuple[int, bool]]:
        results = [executor.results.receive_nowait() for _ in range(executor.results.statistics().current_buffer_used)]
        assert all(result.failure in (None, CAUSE) for result in results)
        return [(result.step_id, result.failure is not None) for result in results]

    async with running(executor_of(script)) as executor:
        for number in range(1, 5):
            await executor.submit(StepPlan(number))
        await tell(1, StepResult(2, [], failure=CAUSE))
        not_finite = StepFailure("SamplingError: not finite", [7])
        await tell(0, StepResult(1, [5]), StepResult(2, []), StepResult(3, [], failure=not_finite), StepResult(4, [6]))
        assert heard() == [(1, False), (2, True), (3, True), (4, True)]
        await executor.submit(StepPlan(0, forgets_all=True))
        await tell(1, StepResult(4, [], failure=CAUSE))  # late: it has not been told yet
        for number in range(1, 7):
            await executor.submit(StepPlan(number))
            await tell(0, StepResult(number, [5]))
        assert heard() == [(number, False) for number in range(1, 7)]
