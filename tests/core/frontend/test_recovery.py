"""Engines that die under requests: what the next one is told, who is tried alone, and who is given up."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import pytest

from aphro_core.errors import RequestError, RequestFailedError
from aphro_core.frontend.frontend import Frontend
from aphro_core.messages.requests import EnginePulse, EngineReady, ResumeEngine, StepFailed
from aphro_core.request import OutputDelta, Request, SamplingParams
from tests.core.frontend.test_frontend import Clock, FakeEngine, gained

pytestmark = pytest.mark.anyio

READY = EngineReady(num_blocks=4, max_model_len=64, ranks=[])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Bench:
    """A frontend, its readers, and engines that come and go."""

    def __init__(self, tasks: Any) -> None:
        self.clock = Clock()
        self.frontend = Frontend(
            None,
            served_name="m",
            vocab_size=300,
            max_model_len=64,
            eos_token_ids=(299,),
            max_queued_requests=8,
            clock=self.clock,
        )
        self.got: dict[int, list[int]] = {}
        self.errors: dict[int, Exception] = {}
        self._tasks = tasks

    def engine(self) -> FakeEngine:
        engine = FakeEngine()
        engine.frontend = self.frontend
        return engine

    async def attach(self, engine: FakeEngine) -> None:
        self.frontend.on_engine_ready(READY)
        self._tasks.start_soon(self.frontend.resume, engine)
        await anyio.wait_all_tasks_blocked()

    async def ask(self, *numbers: int) -> None:
        """A reader for each number, which is also its prompt."""
        for number in numbers:
            self._tasks.start_soon(self._read, number)
        await anyio.wait_all_tasks_blocked()

    async def _read(self, number: int) -> None:
        self.got[number] = []
        try:
            async with self.frontend.stream(request(number)) as deltas:
                async for delta in deltas:
                    assert isinstance(delta, OutputDelta)
                    self.got[number] += delta.token_ids
        except (RequestFailedError, RequestError) as error:
            self.errors[number] = error


def request(number: int) -> Request:
    return Request(f"r{number}", [number], SamplingParams(max_tokens=8))


def told(engine: FakeEngine) -> list[tuple[int, list[int]]]:
    """(prompt, tokens so far) of every sequence that an engine was told of."""
    return [(add.prompt_token_ids[0], add.output_token_ids) for add in engine.added]


def seq_id(engine: FakeEngine, number: int) -> int:
    return next(add.seq_id for add in engine.added if add.prompt_token_ids == [number])


async def test_the_next_engine_goes_on_behind_what_was_sent() -> None:
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks)
        first, second = bench.engine(), bench.engine()
        await bench.attach(first)
        await bench.ask(10, 11)
        first.step(gained(1, [70, 71]))
        bench.frontend.on_engine_lost(None, is_external=True)
        health = bench.frontend.health()
        assert (health.phase, health.ready) == ("recovering", False)
        await bench.ask(12)  # taken, and waits
        await bench.attach(second)
        assert told(second) == [(10, [70, 71]), (11, []), (12, [])]
        assert bench.frontend.health().ready
        for number in (10, 11, 12):
            second.step(gained(seq_id(second, number), [80], "length"))
        await anyio.wait_all_tasks_blocked()
        assert bench.got == {10: [70, 71, 80], 11: [80], 12: [80]}
        tasks.cancel_scope.cancel()


async def test_who_left_meanwhile_is_not_told_of() -> None:
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks)
        first, second = bench.engine(), bench.engine()
        await bench.attach(first)
        async with anyio.create_task_group() as leaving:

            async def read() -> None:
                async with bench.frontend.stream(request(10)) as deltas:
                    await anext(deltas)

            leaving.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            bench.frontend.on_engine_lost(None, is_external=True)
            leaving.cancel_scope.cancel()
        await bench.attach(second)
        assert told(second) == []
        tasks.cancel_scope.cancel()


async def test_a_crowd_that_crashed_is_tried_one_by_one_and_only_the_culprit_ends() -> None:
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks)
        first, second, third = bench.engine(), bench.engine(), bench.engine()
        await bench.attach(first)
        await bench.ask(10, 11, 12)
        bench.frontend.on_engine_lost([1, 2], is_external=False)  # 12 was in no step
        await bench.attach(second)
        assert told(second) == [(10, [])], "alone"
        assert not bench.frontend.health().ready
        second.step(gained(1, [70]))
        await anyio.wait_all_tasks_blocked()
        assert told(second) == [(10, []), (11, [])], "10 has proved itself and goes on"
        bench.frontend.on_engine_lost([1, 2], is_external=False)
        await anyio.wait_all_tasks_blocked()
        assert bench.errors.keys() == {11}
        await bench.attach(third)
        assert told(third) == [(10, [70]), (12, [])]
        await bench.ask(11)
        assert isinstance(bench.errors[11], RequestError), "refused by what it asks for"
        tasks.cancel_scope.cancel()


async def test_a_killed_crowd_is_not_suspected() -> None:
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks)
        await bench.attach(bench.engine())
        await bench.ask(10, 11)
        for _ in range(3):
            bench.frontend.on_engine_lost(None, is_external=True)
            engine = bench.engine()
            await bench.attach(engine)
            assert told(engine) == [(10, []), (11, [])]
        assert bench.errors == {}
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(("seconds", "is_refused"), [(59.0, True), (61.0, False)])
async def test_two_deaths_under_one_request_within_a_minute_end_it(seconds: float, is_refused: bool) -> None:
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks)
        await bench.attach(bench.engine())
        await bench.ask(10)
        for _ in range(2):
            bench.frontend.on_engine_lost(None, is_external=True)
            await bench.attach(bench.engine())
            bench.clock.now += seconds
        assert (10 in bench.errors) == is_refused
        tasks.cancel_scope.cancel()


async def test_a_failed_step_costs_only_its_culprit() -> None:
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks)
        engine = bench.engine()
        await bench.attach(engine)
        await bench.ask(10, 11, 12)
        engine.step(gained(3, [90]))
        engine.sent.clear()
        bench.frontend.on_step_failed(StepFailed("MemoryError", [1, 2]))
        tasks.start_soon(partial(bench.frontend.resume, engine, after_failed_step=True))
        await anyio.wait_all_tasks_blocked()
        assert isinstance(engine.sent[0], ResumeEngine)
        assert told(engine) == [(10, [])]
        engine.sent.clear()
        bench.frontend.on_step_failed(StepFailed("MemoryError", [1]))
        tasks.start_soon(partial(bench.frontend.resume, engine, after_failed_step=True))
        await anyio.wait_all_tasks_blocked()
        assert told(engine) == [(11, [])], "whoever else was in that step is tried too"
        engine.step(gained(2, [80]))
        await anyio.wait_all_tasks_blocked()
        assert told(engine) == [(11, []), (12, [90])], "11 was only beside it"
        error = bench.errors.pop(10)
        assert isinstance(error, RequestFailedError)
        assert error.code == "step_failed"
        await bench.ask(10)
        assert 10 not in bench.errors, "no engine died of it: it may be asked again"
        tasks.cancel_scope.cancel()


async def test_a_step_that_fails_while_an_engine_is_told_of_the_rest_tells_nobody_twice() -> None:
    """Its pipe is full: half of the requests are told of when a step with the first of them has failed."""
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks)
        first, second = bench.engine(), bench.engine()
        await bench.attach(first)
        await bench.ask(10, 11, 12)
        bench.frontend.on_engine_lost(None, is_external=True)
        send, is_read = second.send, anyio.Event()

        async def send_slowly(message: Any) -> None:
            await send(message)
            if len(second.added) == 2 and not is_read.is_set():
                await is_read.wait()

        second.send = send_slowly  # type: ignore[method-assign]
        await bench.attach(second)
        assert told(second) == [(10, []), (11, [])]
        bench.frontend.on_step_failed(StepFailed("", [seq_id(second, 10)]))
        second.sent.clear()  # it has forgotten them
        tasks.start_soon(partial(bench.frontend.resume, second, after_failed_step=True))
        await anyio.wait_all_tasks_blocked()
        is_read.set()
        await anyio.wait_all_tasks_blocked()
        assert told(second) == [(10, [])], "nobody is beside the one that is tried"
        second.step(gained(seq_id(second, 10), [80]))
        await anyio.wait_all_tasks_blocked()
        assert sorted(told(second)) == [(10, []), (11, []), (12, [])]
        tasks.cancel_scope.cancel()


async def test_one_that_leaves_while_it_is_tried_holds_up_nobody() -> None:
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks)
        await bench.attach(bench.engine())
        engine = bench.engine()
        async with anyio.create_task_group() as leaving:

            async def read() -> None:
                async with bench.frontend.stream(request(10)) as deltas:
                    await anext(deltas)

            leaving.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            await bench.ask(11)
            bench.frontend.on_engine_lost(None, is_external=False)
            await bench.attach(engine)
            assert told(engine) == [(10, [])]
            leaving.cancel_scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert told(engine) == [(10, []), (11, [])]
        tasks.cancel_scope.cancel()


async def test_health_is_about_the_present() -> None:
    async with anyio.create_task_group() as tasks:
        bench = Bench(tasks)
        await bench.attach(bench.engine())
        assert bench.frontend.health().ready
        bench.frontend.on_pulse(EnginePulse(3, "rank 1 is stopped"))
        health = bench.frontend.health()
        assert (health.phase, health.ready, health.detail) == ("stalled", False, "rank 1 is stopped")
        bench.frontend.on_pulse(EnginePulse(3))
        assert bench.frontend.health().ready
        bench.clock.now += 1.5
        assert bench.frontend.health().phase == "stalled", "an engine that says nothing for so long stands still"
