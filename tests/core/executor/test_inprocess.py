"""The worker of a CPU on a thread of the engine's process."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import cast

import pytest

from aphro_core.executor import inprocess
from aphro_core.executor.inprocess import InProcessExecutor
from aphro_core.messages.steps import StepPlan, StepResult
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

    def enter_thread(self) -> None:
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
    await executor.aclose()
    assert worker.launched == [1]


class RefusedWorker(DyingWorker):
    """On a GPU that nobody may use."""

    is_asynchronous = True

    def __init__(self) -> None:
        super().__init__()
        self.entered = 0

    def load(self) -> None:
        raise RuntimeError("no such device")

    def enter_thread(self) -> None:
        self.entered += 1


async def test_why_a_device_cannot_be_used_is_told_once() -> None:
    worker = RefusedWorker()
    executor = InProcessExecutor(cast("Worker", worker), asyncio.get_running_loop())
    with pytest.raises(RuntimeError, match="no such device"):
        await executor.load()
    await executor.aclose()
    assert worker.entered == 0, "the other thread does not try it, too"


class BusyWorker(DyingWorker):
    """Computes until it is told to end. A GPU launches at once, and whoever wants the result waits."""

    def __init__(self, *, is_gpu: bool) -> None:
        super().__init__()
        self.may_end, self.is_closed, self.is_asynchronous = threading.Event(), False, is_gpu

    def launch(self, plan: StepPlan) -> BusyWorker:  # type: ignore[override]
        self.launched.append(plan.step_id)
        if not self.is_asynchronous:
            self.result()
        return self

    def result(self) -> StepResult:
        self.may_end.wait(30)
        assert not self.is_closed
        return StepResult(1, [])

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("is_gpu", [False, True])
async def test_a_step_that_computes_neither_holds_up_the_loop_nor_loses_its_worker(
    is_gpu: bool, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inprocess, "_END_SECONDS", 0.4 if hangs else 20.0)
    worker = BusyWorker(is_gpu=is_gpu)
    executor = InProcessExecutor(cast("Worker", worker), asyncio.get_running_loop())
    await executor.load()
    for step_id in (1, 2):
        await executor.submit(StepPlan(step_id, [], [], []))
    await asyncio.sleep(0.05)
    turns: list[float] = []

    async def look() -> None:
        for turn in range(10):
            await asyncio.sleep(0.02)
            turns.append(time.monotonic())
            if turn == 5 and not hangs:
                worker.may_end.set()

    looking = asyncio.create_task(look())
    await executor.aclose()
    assert len(turns) > 5, "others had their turns meanwhile"
    assert worker.is_closed is not hangs
    assert worker.launched == ([1, 2] if is_gpu else [1]), "what has not begun is not begun any more"
    worker.may_end.set()
    await looking
