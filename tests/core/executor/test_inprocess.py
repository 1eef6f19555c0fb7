"""The worker of a CPU on a thread of the engine's process."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from aphro_core.executor.inprocess import InProcessExecutor
from aphro_core.messages.steps import StepPlan
from aphro_core.worker.worker import Worker

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class DyingWorker:
    is_asynchronous = False

    def __init__(self) -> None:
        self.launched: list[int] = []

    def load(self) -> None:
        pass

    def launch(self, plan: StepPlan) -> None:
        self.launched.append(plan.step_id)
        raise SystemError("not to be survived")

    def close(self) -> None:
        pass


async def test_nothing_is_computed_behind_what_the_worker_died_of() -> None:
    worker = DyingWorker()
    executor = InProcessExecutor(cast("Worker", worker), asyncio.get_running_loop())
    await executor.load()
    for step_id in (1, 2):
        await executor.submit(StepPlan(step_id, [], [], []))
    with pytest.raises(SystemError, match="not to be survived"):
        await executor.raise_failure()
    executor.close()
    assert worker.launched == [1]
